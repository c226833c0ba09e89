// Products with packed weights.
#pragma once

#include <cstdint>

#include "tensors.h"
#include "vec.h"

namespace saccade {

#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;  // vectors of outputs that a register tile holds for each row
#else
constexpr int kBlockVectors = 1;
#endif
constexpr int64_t kBlock = kBlockVectors * kLanes;  // outputs whose weights lie together

// A weight as pack_linear lays it out, and its bias (null: none). Borrowed.
template <typename T>
struct PackedLinear {
  const T *weight, *bias;
  int64_t inputs, outputs;

  int64_t blocks() const { return ceil_div(outputs, kBlock); }
};

// out [rows, outputs] = x [rows, inputs] W^T + b for the outputs of blocks [first, last); strides are between rows.
// An output is one chain of multiply-adds over the inputs as they rise, so neither the other rows nor the split of
// the blocks enter.
template <typename T>
void multiply(const PackedLinear<T>& linear, const T* x, int64_t x_stride, int64_t rows, T* out, int64_t out_stride,
              int64_t first, int64_t last);

// Elements of the packed weight.
template <typename T>
int64_t packed_size(const PackedLinear<T>& linear);

// What a product costs, in the units of parallel_ranges.
template <typename T>
int64_t cost_of(const PackedLinear<T>& linear, int64_t rows) {
  return linear.inputs * linear.outputs * (static_cast<int64_t>(sizeof(T)) + rows / 4) / 64;
}

// Calls body(T{}) for the types that have a packed format.
template <typename Body>
void for_packable(at::ScalarType dtype, const char* op, Body body) {
  if (dtype == at::kFloat) return body(float{});
  TORCH_CHECK(dtype == at::kBFloat16, op, ": no packed format for ", dtype);
  body(c10::BFloat16{});
}

}  // namespace saccade
