// Products with packed weights: made for few rows, where reading the weights is all that takes time.
//
// An output is one chain of multiply-adds over the inputs as they rise, so it has the same bits for any number of rows.
#include <torch/library.h>

#include <optional>

#include "block_linear.h"
#include "vec.h"
#include "weight_memory.h"

namespace saccade {
namespace {

#if defined(__AVX512F__)
constexpr int kBlockVectors = 4;  // vectors of outputs that a register tile holds for each row
#else
constexpr int kBlockVectors = 1;
#endif
constexpr int64_t kBlock = kBlockVectors * kLanes;  // outputs whose weights lie together

// A packed weight is [blocks, steps, kBlock] items, zeros where it has no outputs or inputs. An item is what one
// multiply-add takes of an output's weights.
template <typename T>
struct Format {
  static constexpr int64_t kItem = 1;  // inputs of an item
  using X = float;                     // an item of x

  static X item(const T* x) { return static_cast<float>(*x); }
  static f32x16 add(f32x16 sum, X x, const T* weights) { return sum + x * load<T>(weights); }
};

#if defined(__AVX512BF16__)
template <>
struct Format<c10::BFloat16> {
  static constexpr int64_t kItem = 2;
  using X = __m512bh;

  static X item(const c10::BFloat16* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof(pair));
    return (__m512bh)_mm512_set1_epi32(pair);
  }
  static f32x16 add(f32x16 sum, X x, const c10::BFloat16* weights) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, x, (__m512bh)_mm512_loadu_si512(weights));
  }
};
#endif

template <typename T>
constexpr int64_t kStep = Format<T>::kItem * kBlock;  // weights of a block's step

constexpr int64_t kTileRows = 6;                // with four vectors each, and the weights: 29 of 32 registers
constexpr int64_t kChunkBytes = 16 * 1024;      // weights that stay in the first-level cache for all tiles
constexpr int64_t kAhead = 4 * 1024;            // how far ahead a single tile asks for weights
constexpr int64_t kGroupRows = 16 * kTileRows;  // rows whose sums stay in the second-level cache

// sums [R, kBlock] += x [R, steps] times the weights of `steps` steps. Each step asks the memory for `Lines` cache lines
// from `ahead` on.
template <typename T, int R, int Lines>
void multiply_tile(const T* x, int64_t x_stride, const T* weights, int64_t steps, const char* ahead, float* sums) {
  using F = Format<T>;
  f32x16 sum[R][kBlockVectors];
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) sum[r][v] = load<float>(sums + r * kBlock + v * kLanes);
  for (int64_t s = 0; s < steps; ++s, weights += kStep<T>, ahead += Lines * 64) {
#pragma GCC unroll 4
    for (int line = 0; line < Lines; ++line) __builtin_prefetch(ahead + line * 64);
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r) {
      const typename F::X item = F::item(x + r * x_stride + s * F::kItem);
#pragma GCC unroll 4
      for (int v = 0; v < kBlockVectors; ++v) sum[r][v] = F::add(sum[r][v], item, weights + v * kLanes * F::kItem);
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int v = 0; v < kBlockVectors; ++v) store<float>(sums + r * kBlock + v * kLanes, sum[r][v]);
}

template <typename T, int Lines>
void multiply_rows(int64_t rows, const T* x, int64_t x_stride, const T* weights, int64_t steps, const char* ahead,
                   float* sums) {
  switch (rows) {
    case 1: return multiply_tile<T, 1, Lines>(x, x_stride, weights, steps, ahead, sums);
    case 2: return multiply_tile<T, 2, Lines>(x, x_stride, weights, steps, ahead, sums);
    case 3: return multiply_tile<T, 3, Lines>(x, x_stride, weights, steps, ahead, sums);
    case 4: return multiply_tile<T, 4, Lines>(x, x_stride, weights, steps, ahead, sums);
    case 5: return multiply_tile<T, 5, Lines>(x, x_stride, weights, steps, ahead, sums);
    default: return multiply_tile<T, 6, Lines>(x, x_stride, weights, steps, ahead, sums);
  }
}

// One block of outputs for a group of rows: a chunk of weights at a time, for all tiles of rows, which share the work
// of asking for the next chunk.
template <typename T>
void multiply_block(const T* x, int64_t x_stride, int64_t rows, const T* weights, int64_t steps, float* sums) {
  constexpr int64_t kStepBytes = kStep<T> * static_cast<int64_t>(sizeof(T)), kLines = kStepBytes / 64;
  const int64_t tiles = ceil_div(rows, kTileRows), lines = ceil_div(kLines, tiles);
  const int64_t chunk = tiles == 1 ? steps : kChunkBytes / kStepBytes;
  std::fill(sums, sums + rows * kBlock, 0.0f);
  for (int64_t s = 0; s < steps; s += chunk)
    for (int64_t t = 0, row = 0; t < tiles; ++t) {
      const int64_t count = (rows - row) / (tiles - t);  // tiles of like size
      const T *from = x + row * x_stride + s * Format<T>::kItem, *with = weights + s * kStep<T>;
      const char* ahead = reinterpret_cast<const char*>(with) + (tiles == 1 ? kAhead : kChunkBytes);
      const auto multiply = lines >= 3 ? multiply_rows<T, 4> : lines == 2 ? multiply_rows<T, 2> : multiply_rows<T, 1>;
      multiply(count, from, x_stride, with, std::min(chunk, steps - s), ahead + t * chunk * lines * 64, sums + row * kBlock);
      row += count;
    }
}

template <typename T>
class PackedLinear : public BlockLinear<T> {
 public:
  PackedLinear(const T* weight, const T* bias, int64_t inputs, int64_t outputs)
      : weight_(weight), bias_(bias), inputs_(inputs), outputs_(outputs), steps_(ceil_div(inputs, Format<T>::kItem)) {}

  int64_t size() const { return blocks() * steps_ * kStep<T>; }  // elements of the packed weight
  int64_t blocks() const override { return ceil_div(outputs_, kBlock); }
  int64_t cost(int64_t rows) const override {
    return inputs_ * outputs_ * (static_cast<int64_t>(sizeof(T)) + rows / 4) / 64;
  }

  void multiply(const T* x, int64_t x_stride, int64_t rows, T* out, int64_t out_stride, int64_t first,
                int64_t last) const override {
    const int64_t width = steps_ * Format<T>::kItem;
    if (width != inputs_) {  // items must be whole
      const Widened<T> wide(x, x_stride, rows, inputs_, width);
      return multiply_whole(wide.data(), width, rows, out, out_stride, first, last);
    }
    multiply_whole(x, x_stride, rows, out, out_stride, first, last);
  }

 private:
  void multiply_whole(const T* x, int64_t x_stride, int64_t rows, T* out, int64_t out_stride, int64_t first,
                      int64_t last) const {
    alignas(64) float sums[kGroupRows * kBlock];
    for (int64_t block = first; block < last; ++block)
      for (int64_t row = 0; row < rows; row += kGroupRows) {
        const int64_t count = std::min(kGroupRows, rows - row);
        multiply_block<T>(x + row * x_stride, x_stride, count, weight_ + block * steps_ * kStep<T>, steps_, sums);
        finish_block(sums, count, block, out + row * out_stride, out_stride);
      }
  }

  void finish_block(const float* sums, int64_t rows, int64_t block, T* out, int64_t stride) const {
    const int64_t begin = block * kBlock, end = std::min(begin + kBlock, outputs_);
    for (int64_t r = 0; r < rows; ++r)
      for (int64_t o = begin; o < end; o += kLanes) {
        f32x16 lanes = load<float>(sums + r * kBlock + (o - begin));
        if (bias_) lanes += load_upto<T>(bias_ + o, end - o);
        store_upto<T>(out + r * stride + o, lanes, end - o);
      }
  }

  const T *weight_, *bias_;  // bias null: none
  const int64_t inputs_, outputs_, steps_;
};

}  // namespace

template <typename T>
std::unique_ptr<BlockLinear<T>> packed_linear_of(const at::Tensor& weight, const std::optional<at::Tensor>& bias,
                                                 int64_t inputs, int64_t outputs) {
  auto linear = std::make_unique<PackedLinear<T>>(weight.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr,
                                                  inputs, outputs);
  TORCH_CHECK(weight.numel() == linear->size(), "packed_linear: this weight is not [", outputs, ", ", inputs, "]");
  TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == outputs), "packed_linear: bias must be [", outputs, "]");
  return linear;
}

template std::unique_ptr<BlockLinear<float>> packed_linear_of(const at::Tensor&, const std::optional<at::Tensor>&, int64_t,
                                                              int64_t);
template std::unique_ptr<BlockLinear<c10::BFloat16>> packed_linear_of(const at::Tensor&, const std::optional<at::Tensor>&,
                                                                      int64_t, int64_t);

namespace {

// Calls body(T{}) for the types that have a packed format.
template <typename Body>
void for_packable(at::ScalarType dtype, const char* op, Body body) {
  if (dtype == at::kFloat) return body(float{});
  TORCH_CHECK(dtype == at::kBFloat16, op, ": no packed format for ", dtype);
  body(c10::BFloat16{});
}

// weight [O, I] -> the packed weight, a flat tensor.
at::Tensor pack_linear(const at::Tensor& weight) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.numel() > 0, "pack_linear: expected a dense [O, I]");
  const int64_t outputs = weight.size(0), inputs = weight.size(1);
  at::Tensor packed;
  for_packable(weight.scalar_type(), "pack_linear", [&](auto type) {
    using T = decltype(type);
    constexpr int64_t item = Format<T>::kItem;
    const int64_t size = ceil_div(inputs, item) * kStep<T>;  // of a block
    packed = empty_weights(ceil_div(outputs, kBlock) * size, weight.scalar_type());
    const T* from = weight.const_data_ptr<T>();
    T* to = packed.mutable_data_ptr<T>();
    parallel_tasks(ceil_div(outputs, kBlock), weight.numel(), [&](int64_t block) {
      T* at = to + block * size;
      for (int64_t i = 0; i < size; ++i) {
        const int64_t input = i / kStep<T> * item + i % item, output = block * kBlock + i % kStep<T> / item;
        at[i] = input < inputs && output < outputs ? from[output * inputs + input] : T(0.0f);
      }
    });
  });
  return packed;
}

// x [T, I] times a packed weight [O, I], plus bias [O] -> [T, O].
at::Tensor packed_linear(const at::Tensor& any_x, const at::Tensor& packed, const std::optional<at::Tensor>& bias,
                         int64_t outputs) {
  TORCH_CHECK(any_x.dim() == 2, "packed_linear: expected x [T, I]");
  const at::Tensor x = any_x.stride(1) == 1 ? any_x : any_x.contiguous();
  TORCH_CHECK(packed.scalar_type() == x.scalar_type(), "packed_linear: x is ", x.scalar_type(), ", the weight ",
              packed.scalar_type());
  at::Tensor out;
  for_packable(x.scalar_type(), "packed_linear", [&](auto type) {
    using T = decltype(type);
    out = multiply_all(*packed_linear_of<T>(packed, bias, x.size(1), outputs), x, outputs);
  });
  return out;
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def("pack_linear(Tensor weight) -> Tensor");
  m.def("packed_linear(Tensor x, Tensor packed, Tensor? bias, int outputs) -> Tensor");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("pack_linear", &pack_linear);
  m.impl("packed_linear", &packed_linear);
}

}  // namespace saccade
