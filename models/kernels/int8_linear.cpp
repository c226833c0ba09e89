// Linear layers with int8 weights: out[r, o] = scale[o] * sum_i x[r, i] * q[o, i] + bias[o], in float32 (float64 for
// float64 rows), rounded once at the end.
//
// A step at batch 1 is one read of the weights, so half the bytes of bfloat16 is up to twice the speed, if turning them
// into numbers to multiply by takes less time than the read. Weights lie in blocks of 64 outputs, whose inputs follow one
// another; a few rows at a time decode a block as they go (a buffer of decoded weights for more rows gained nothing).
// Each output has one sum, in rising order of the inputs: a row's bits do not depend on the other rows.
#include <torch/library.h>

#include <optional>

#include "block_linear.h"
#include "vec.h"
#include "weight_memory.h"

#if defined(__AVX512BF16__) && defined(__AVX512VBMI__)
#define SACCADE_BF16_PAIRS 1
#endif

namespace saccade {
namespace {

constexpr int kBlock = 64;                 // outputs
constexpr int kVectors = kBlock / kLanes;  // of a block, for one group of inputs

// ---- formats: what a group of inputs is, and how its weights are stored ----

// Any type: one input at a time, weights as they are, sums by fused multiply-add.
template <typename T>
struct Single {
  using Sum = vec_t<acc_t<T>>;
  using Weights = Sum;
  using Input = acc_t<T>;
  static constexpr int kGroup = 1;  // inputs
  static constexpr int kRows = 6;   // whose sums fit the registers

  static int64_t position(int output, int /*input*/) { return output; }
  static uint8_t encode(int8_t weight) { return static_cast<uint8_t>(weight); }
  void decode(const uint8_t* from, Weights* to) const {
    using i8x16 = int8_t __attribute__((vector_size(16)));
    for (int v = 0; v < kVectors; ++v) {
      i8x16 bytes;
      std::memcpy(&bytes, from + v * kLanes, sizeof(bytes));
#if defined(__AVX512F__)
      if constexpr (std::is_same_v<Sum, f32x16>) {
        to[v] = (f32x16)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32((__m128i)bytes));
        continue;
      }
#endif
      to[v] = __builtin_convertvector(bytes, Sum);
    }
  }
  static Input input(const T* x) { return static_cast<Input>(x[0]); }
  static Sum add(Sum sum, Input x, Weights weight) { return sum + splat<Sum>(x) * weight; }
};

#if defined(SACCADE_BF16_PAIRS)
// bfloat16 by vdpbf16ps, two inputs at a time. A weight is stored as sign and magnitude: the two bytes of its bfloat16
// are then two look-ups in tables of 128 entries and an OR of the sign.
struct Pairs {
  using Sum = f32x16;
  using Weights = __m512i;
  using Input = __m512i;
  static constexpr int kGroup = 2;
  static constexpr int kRows = 5;  // the tables take registers, too

  __m512i low[2], high[2];  // bytes of the bfloat16 of 0 .. 127

  Pairs() {
    alignas(64) uint8_t bytes[2][128];
    for (int i = 0; i < 128; ++i) {
      const uint16_t bits = c10::BFloat16(static_cast<float>(i)).x;
      bytes[0][i] = bits & 255;
      bytes[1][i] = bits >> 8;
    }
    for (int half = 0; half < 2; ++half) {
      low[half] = _mm512_load_si512(bytes[0] + 64 * half);
      high[half] = _mm512_load_si512(bytes[1] + 64 * half);
    }
  }

  // Interleaving works on 16 bytes at a time, of which the lower 8 go to one vector and the upper 8 to the next.
  static int64_t position(int output, int input) {
    const int vector = output / kLanes, lane = output % kLanes;
    return vector / 2 * 64 + lane / 4 * 16 + vector % 2 * 8 + lane % 4 * 2 + input;
  }
  static uint8_t encode(int8_t weight) { return weight < 0 ? 0x80 | -weight : weight; }
  void decode(const uint8_t* from, Weights* to) const {
    for (int v = 0; v < kVectors; v += 2) {
      const __m512i bytes = _mm512_loadu_si512(from + v / 2 * 64);
      const __m512i lower = _mm512_permutex2var_epi8(low[0], bytes, low[1]);  // the index is the lower 7 bits
      const __m512i upper = _mm512_ternarylogic_epi32(_mm512_permutex2var_epi8(high[0], bytes, high[1]), bytes,
                                                      _mm512_set1_epi8(-128), 0xF8);  // a | (b & c)
      to[v] = _mm512_unpacklo_epi8(lower, upper);
      to[v + 1] = _mm512_unpackhi_epi8(lower, upper);
    }
  }
  static Input input(const c10::BFloat16* x) {
    int32_t pair;
    std::memcpy(&pair, x, sizeof(pair));
    return _mm512_set1_epi32(pair);
  }
  static Sum add(Sum sum, Input x, Weights weight) {
    return (f32x16)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weight, (__m512bh)x);
  }
};
#endif

// Calls body(T{}, Format{}) with the format of rows of this type.
template <typename Body>
void for_format(at::ScalarType dtype, const char* op, Body body) {
#if defined(SACCADE_BF16_PAIRS)
  if (dtype == at::kBFloat16) return body(c10::BFloat16{}, Pairs{});
#endif
  for_floating(dtype, op, [&](auto type) { body(type, Single<decltype(type)>{}); });
}

// ---- sums ----

// The sums [Rows][4] of one block.
template <int Rows, typename F, typename T>
inline void tile(const F& format, const T* x, int64_t stride, int64_t groups, const uint8_t* bytes,
                 typename F::Sum* sums) {
  constexpr int kBytes = kBlock * F::kGroup;
  typename F::Sum acc[Rows][kVectors] = {};
  for (int64_t g = 0; g < groups; ++g, bytes += kBytes) {
    // hardware prefetch stops at page ends; 2 KiB ahead keeps the read going
    for (int line = 0; line < kBytes; line += 64) __builtin_prefetch(bytes + line + 2048);
    typename F::Weights weights[kVectors];
    format.decode(bytes, weights);
    for (int r = 0; r < Rows; ++r) {
      const auto input = F::input(x + r * stride + g * F::kGroup);
      for (int v = 0; v < kVectors; ++v) acc[r][v] = F::add(acc[r][v], input, weights[v]);
    }
  }
  for (int r = 0; r < Rows; ++r)
    for (int v = 0; v < kVectors; ++v) sums[r * kVectors + v] = acc[r][v];
}

// The same for a number of rows that is known only now, at most Rows.
template <int Rows, typename F, typename T>
inline void tile_of(int64_t rows, const F& format, const T* x, int64_t stride, int64_t groups, const uint8_t* bytes,
                    typename F::Sum* sums) {
  if constexpr (Rows > 1) {
    if (rows < Rows) return tile_of<Rows - 1>(rows, format, x, stride, groups, bytes, sums);
  }
  tile<Rows>(format, x, stride, groups, bytes, sums);
}

// Scale, bias, rounding. `scale` and `bias` (or null) are the block's own.
template <typename T>
void finish(const vec_t<acc_t<T>>* sums, int64_t rows, const float* scale, const float* bias, int64_t outputs, T* out,
            int64_t stride) {
  using Sum = vec_t<acc_t<T>>;
  for (int v = 0; v * kLanes < outputs; ++v) {
    const int64_t left = outputs - v * kLanes;
    const auto wide = [&](const float* from) {
      return __builtin_convertvector(load_upto<float>(from + v * kLanes, left), Sum);
    };
    const Sum factor = wide(scale), shift = bias ? wide(bias) : Sum{};
    for (int64_t r = 0; r < rows; ++r)
      store_upto<T>(out + r * stride + v * kLanes, sums[r * kVectors + v] * factor + shift, left);
  }
}

template <typename T, typename F>
class Int8Linear : public BlockLinear<T> {
 public:
  // bias null: none
  Int8Linear(const uint8_t* weight, const float* scale, const float* bias, int64_t inputs, int64_t outputs)
      : weight_(weight), scale_(scale), bias_(bias), inputs_(inputs), outputs_(outputs), groups_(ceil_div(inputs, F::kGroup)) {}

  int64_t blocks() const override { return ceil_div(outputs_, kBlock); }
  int64_t cost(int64_t rows) const override { return outputs_ * inputs_ * (4 + rows) / 200; }

  void multiply(const T* x, int64_t x_stride, int64_t rows, T* out, int64_t out_stride, int64_t first,
                int64_t last) const override {
    const int64_t width = groups_ * F::kGroup;
    if (width != inputs_) {  // groups must be whole
      const Widened<T> wide(x, x_stride, rows, inputs_, width);
      return multiply_whole(wide.data(), width, rows, out, out_stride, first, last);
    }
    multiply_whole(x, x_stride, rows, out, out_stride, first, last);
  }

 private:
  void multiply_whole(const T* x, int64_t x_stride, int64_t rows, T* out, int64_t out_stride, int64_t first,
                      int64_t last) const {
    typename F::Sum sums[F::kRows * kVectors];
    for (int64_t block = first; block < last; ++block) {
      const uint8_t* bytes = weight_ + block * groups_ * kBlock * F::kGroup;
      const int64_t column = block * kBlock, filled = std::min<int64_t>(kBlock, outputs_ - column);
      for (int64_t r = 0; r < rows; r += F::kRows) {
        const int64_t count = std::min<int64_t>(F::kRows, rows - r);
        tile_of<F::kRows>(count, format_, x + r * x_stride, x_stride, groups_, bytes, sums);
        finish<T>(sums, count, scale_ + column, bias_ ? bias_ + column : nullptr, filled, out + r * out_stride + column,
                  out_stride);
      }
    }
  }

  const F format_{};
  const uint8_t* weight_;
  const float *scale_, *bias_;
  const int64_t inputs_, outputs_, groups_;
};

}  // namespace

// Weights [O, I] int8 (-127 .. 127) in the order in which rows of `dtype` read them: bytes, as many as there are
// weights, outputs filled up to whole blocks and inputs to whole groups with zeros.
at::Tensor int8_pack(const at::Tensor& weight, at::ScalarType dtype) {
  TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous(), "int8_pack: weight must be [O, I], contiguous");
  const int64_t outputs = weight.size(0), inputs = weight.size(1), blocks = ceil_div(outputs, kBlock);
  at::Tensor packed;
  for_format(dtype, "int8_pack", [&](auto, auto format) {
    using F = decltype(format);
    const int64_t groups = ceil_div(inputs, F::kGroup);
    packed = empty_weights(blocks * groups * kBlock * F::kGroup, at::kByte).view({blocks, groups, kBlock * F::kGroup});
    const int8_t* from = weight.const_data_ptr<int8_t>();
    uint8_t* to = packed.mutable_data_ptr<uint8_t>();
    parallel_tasks(blocks, outputs * inputs, [&](int64_t block) {
      uint8_t* bytes = to + block * groups * kBlock * F::kGroup;
      std::memset(bytes, 0, groups * kBlock * F::kGroup);
      for (int64_t o = 0; o < std::min<int64_t>(kBlock, outputs - block * kBlock); ++o) {
        const int8_t* row = from + (block * kBlock + o) * inputs;
        for (int64_t i = 0; i < inputs; ++i)
          bytes[i / F::kGroup * kBlock * F::kGroup + F::position(o, i % F::kGroup)] = F::encode(row[i]);
      }
    });
  });
  return packed;
}

template <typename T>
std::unique_ptr<BlockLinear<T>> int8_linear_of(const at::Tensor& weight, const at::Tensor& scale,
                                               const std::optional<at::Tensor>& bias, int64_t inputs, int64_t outputs) {
  std::unique_ptr<BlockLinear<T>> linear;
  for_format(c10::CppTypeToScalarType<T>::value, "int8_linear", [&](auto type, auto format) {
    if constexpr (std::is_same_v<decltype(type), T>) {
      using F = decltype(format);
      TORCH_CHECK(weight.dim() == 3 && weight.size(2) == kBlock * F::kGroup,
                  "int8_linear: the weights were packed for another dtype");
      TORCH_CHECK(ceil_div(inputs, F::kGroup) == weight.size(1), "int8_linear: x has ", inputs, " inputs, not ",
                  weight.size(1) * F::kGroup);
      TORCH_CHECK(ceil_div(outputs, kBlock) == weight.size(0) && scale.numel() == outputs && (!bias || bias->numel() == outputs),
                  "int8_linear: scale or bias does not fit the weights");
      linear = std::make_unique<Int8Linear<T, F>>(weight.const_data_ptr<uint8_t>(), scale.const_data_ptr<float>(),
                                                  bias ? bias->const_data_ptr<float>() : nullptr, inputs, outputs);
    }
  });
  return linear;
}

template std::unique_ptr<BlockLinear<float>> int8_linear_of(const at::Tensor&, const at::Tensor&,
                                                            const std::optional<at::Tensor>&, int64_t, int64_t);
template std::unique_ptr<BlockLinear<c10::BFloat16>> int8_linear_of(const at::Tensor&, const at::Tensor&,
                                                                    const std::optional<at::Tensor>&, int64_t, int64_t);

// x [T, I] times packed weights, with scale [O] and bias [O] in float32: [T, O] of x's type.
at::Tensor int8_linear(const at::Tensor& any_x, const at::Tensor& packed, const at::Tensor& scale,
                       const std::optional<at::Tensor>& bias) {
  const at::Tensor x = any_x.stride(1) == 1 ? any_x : any_x.contiguous();
  at::Tensor out;
  for_floating(x.scalar_type(), "int8_linear", [&](auto type) {
    using T = decltype(type);
    out = multiply_all(*int8_linear_of<T>(packed, scale, bias, x.size(1), scale.numel()), x, scale.numel());
  });
  return out;
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def("int8_pack(Tensor weight, ScalarType dtype) -> Tensor");
  m.def("int8_linear(Tensor x, Tensor packed, Tensor scale, Tensor? bias) -> Tensor");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("int8_pack", &int8_pack);
  m.impl("int8_linear", &int8_linear);
}

}  // namespace saccade
