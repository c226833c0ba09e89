// A decoder layer's element-wise operations on one row (layer_ops.cpp). Arithmetic is float32, or float64 for float64
// tensors. They are compiled once, for whoever calls them: another copy might fuse multiplications and additions in
// another way.
#pragma once

#include "vec.h"

namespace saccade {

// out = x / rms(x) * weight; out may be x.
template <typename T, typename W>
void norm_row(const T* x, const W* weight, acc_t<T> eps, int64_t width, T* out);

// stream += added.
template <typename T>
void add_row(const T* added, T* stream, int64_t width);

// One head in the halves convention: the first 2 * half dims are rotated, the others pass; out may be x.
template <typename T>
void rotate_head(const T* x, const acc_t<T>* cos, const acc_t<T>* sin, int64_t half, int64_t dims, T* out);

enum Activation : int64_t { kSilu, kGelu, kGeluTanh };  // the order of cpu_ops.py: ACTIVATIONS

// out = activation(gate) * up.
template <typename T>
void gated_row(const T* gate, const T* up, int64_t activation, int64_t width, T* out);

}  // namespace saccade
