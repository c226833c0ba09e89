// Products with packed weights (linear.h): made for few rows, where reading the weights is all that takes time.
#include "linear.h"

#include <torch/library.h>

#include <optional>
#include <vector>

#include "weight_memory.h"

namespace saccade {
namespace {

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
void finish_block(const PackedLinear<T>& linear, const float* sums, int64_t rows, int64_t block, T* out, int64_t stride) {
  const int64_t begin = block * kBlock, end = std::min(begin + kBlock, linear.outputs);
  for (int64_t r = 0; r < rows; ++r)
    for (int64_t o = begin; o < end; o += kLanes) {
      f32x16 lanes = load<float>(sums + r * kBlock + (o - begin));
      if (linear.bias) lanes += load_upto<T>(linear.bias + o, end - o);
      store_upto<T>(out + r * stride + o, lanes, end - o);
    }
}

}  // namespace

template <typename T>
void multiply(const PackedLinear<T>& linear, const T* x, int64_t x_stride, int64_t rows, T* out, int64_t out_stride,
              int64_t first, int64_t last) {
  alignas(64) float sums[kGroupRows * kBlock];
  const int64_t steps = ceil_div(linear.inputs, Format<T>::kItem);
  std::vector<T> padded;  // x with whole items
  if (linear.inputs % Format<T>::kItem != 0) {
    const int64_t width = steps * Format<T>::kItem;
    padded.resize(rows * width);
    for (int64_t r = 0; r < rows; ++r) std::copy_n(x + r * x_stride, linear.inputs, padded.data() + r * width);
    x = padded.data();
    x_stride = width;
  }
  for (int64_t block = first; block < last; ++block)
    for (int64_t row = 0; row < rows; row += kGroupRows) {
      const int64_t count = std::min(kGroupRows, rows - row);
      multiply_block<T>(x + row * x_stride, x_stride, count, linear.weight + block * steps * kStep<T>, steps, sums);
      finish_block<T>(linear, sums, count, block, out + row * out_stride, out_stride);
    }
}

template <typename T>
int64_t packed_size(const PackedLinear<T>& linear) {
  return linear.blocks() * ceil_div(linear.inputs, Format<T>::kItem) * kStep<T>;
}

template int64_t packed_size(const PackedLinear<float>&);
template int64_t packed_size(const PackedLinear<c10::BFloat16>&);
template void multiply(const PackedLinear<float>&, const float*, int64_t, int64_t, float*, int64_t, int64_t, int64_t);
template void multiply(const PackedLinear<c10::BFloat16>&, const c10::BFloat16*, int64_t, int64_t, c10::BFloat16*, int64_t,
                       int64_t, int64_t);

namespace {

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
  const int64_t rows = x.size(0);
  at::Tensor out = empty({rows, outputs}, x.scalar_type());
  for_packable(x.scalar_type(), "packed_linear", [&](auto type) {
    using T = decltype(type);
    const PackedLinear<T> linear{packed.const_data_ptr<T>(), bias ? bias->const_data_ptr<T>() : nullptr, x.size(1), outputs};
    TORCH_CHECK(packed.numel() == packed_size(linear),
                "packed_linear: this weight is not [", outputs, ", ", linear.inputs, "]");
    TORCH_CHECK(!bias || (bias->is_contiguous() && bias->numel() == outputs), "packed_linear: bias must be [", outputs, "]");
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    parallel_ranges(linear.blocks(), cost_of(linear, rows), [&](int64_t first, int64_t last) {
      multiply<T>(linear, from, x.stride(0), rows, to, outputs, first, last);
    });
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
