// Linear layers for few rows, whose outputs lie in blocks that threads can share.
#pragma once

#include <algorithm>
#include <cstdint>
#include <memory>
#include <optional>
#include <vector>

#include "tensors.h"

namespace saccade {

// One layer, whatever the format of its weights; they are borrowed.
template <typename T>
class BlockLinear {
 public:
  virtual ~BlockLinear() = default;

  virtual int64_t blocks() const = 0;
  // Of all blocks, in the units of parallel_ranges.
  virtual int64_t cost(int64_t rows) const = 0;
  // out [rows, outputs] = x [rows, inputs] W^T + b for the outputs of blocks [first, last); strides are between rows.
  // Neither the other rows nor the split of the blocks enter into an output.
  virtual void multiply(const T* x, int64_t x_stride, int64_t rows, T* out, int64_t out_stride, int64_t first,
                        int64_t last) const = 0;
};

// By the weight that pack_linear made, and bias [O] of the same type.
template <typename T>
std::unique_ptr<BlockLinear<T>> packed_linear_of(const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                                 int64_t inputs, int64_t outputs);

// By the weight that int8_pack made, and scale [O] and bias [O] in float32.
template <typename T>
std::unique_ptr<BlockLinear<T>> int8_linear_of(const at::Tensor& weight, const at::Tensor& scale,
                                               const std::optional<at::Tensor>& bias, int64_t inputs, int64_t outputs);

// x [T, I] times such a layer: [T, O].
template <typename T>
at::Tensor multiply_all(const BlockLinear<T>& linear, const at::Tensor& x, int64_t outputs) {
  const int64_t rows = x.size(0);
  at::Tensor out = empty({rows, outputs}, x.scalar_type());
  const T* from = x.const_data_ptr<T>();
  T* to = out.mutable_data_ptr<T>();
  parallel_ranges(linear.blocks(), linear.cost(rows), [&](int64_t first, int64_t last) {
    linear.multiply(from, x.stride(0), rows, to, outputs, first, last);
  });
  return out;
}

// Rows of x with zeros behind them, up to `width`.
template <typename T>
class Widened {
 public:
  Widened(const T* x, int64_t stride, int64_t rows, int64_t inputs, int64_t width) : rows_(rows * width) {
    for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * stride, inputs, rows_.data() + r * width);
  }
  const T* data() const { return rows_.data(); }

 private:
  std::vector<T> rows_;
};

}  // namespace saccade
