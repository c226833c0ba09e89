// Sixteen-lane arithmetic for any CPU: the compiler's vector extension, lowered to whatever registers there are.
//
// Everything here gives a lane the same bits whatever the other lanes hold and wherever it stands: results must not
// depend on how keys fall into blocks. So there is no -ffast-math, and every reduction has one fixed order.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>
#include <utility>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace saccade {

constexpr int kLanes = 16;  // PAGE_SIZE of models/batch.py: a page of keys is one block

using f32x16 = float __attribute__((vector_size(64)));
using i32x16 = int32_t __attribute__((vector_size(64)));
using u32x16 = uint32_t __attribute__((vector_size(64)));
using u16x16 = uint16_t __attribute__((vector_size(32)));
using f64x16 = double __attribute__((vector_size(128)));

template <typename T>
using acc_t = std::conditional_t<std::is_same_v<T, double>, double, float>;
template <typename A>
using vec_t = std::conditional_t<std::is_same_v<A, double>, f64x16, f32x16>;

constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

template <typename V, typename A>
inline V splat(A value) {
  return value - V{};  // x - 0 is x for every x, -0 included, and compiles to a broadcast
}

// ---- loads and stores that convert: T in memory, acc_t<T> in lanes ----

// 16 bits to and from 32, zero-extended and cut off; the generic conversion takes GCC four times the instructions.
inline u32x16 widen(const void* from) {
#if defined(__AVX512F__)
  return (u32x16)_mm512_cvtepu16_epi32(_mm256_loadu_si256(static_cast<const __m256i*>(from)));
#else
  u16x16 bits;
  std::memcpy(&bits, from, sizeof(bits));
  return __builtin_convertvector(bits, u32x16);
#endif
}

inline void narrow(void* to, u32x16 lanes) {
#if defined(__AVX512F__)
  _mm256_storeu_si256(static_cast<__m256i*>(to), _mm512_cvtepi32_epi16((__m512i)lanes));
#else
  const u16x16 bits = __builtin_convertvector(lanes, u16x16);
  std::memcpy(to, &bits, sizeof(bits));
#endif
}

template <typename T>
inline vec_t<acc_t<T>> load(const T* from) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    return (f32x16)(widen(from) << 16);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if defined(__AVX512F__)
    return (f32x16)_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)));
#else
    f32x16 wide;
    for (int i = 0; i < kLanes; ++i) wide[i] = static_cast<float>(from[i]);
    return wide;
#endif
  } else {
    vec_t<T> same;
    std::memcpy(&same, from, sizeof(same));
    return same;
  }
}

template <typename T>
inline void store(T* to, vec_t<acc_t<T>> lanes) {
  if constexpr (std::is_same_v<T, c10::BFloat16>) {
    u32x16 bits = (u32x16)lanes;
    u32x16 rounded = (bits + 0x7fff + ((bits >> 16) & 1)) >> 16;  // to nearest, ties to even
    rounded = (lanes == lanes) ? rounded : (u32x16{} + 0x7fc0);    // rounding could turn a NaN into infinity
    narrow(to, rounded);
  } else if constexpr (std::is_same_v<T, c10::Half>) {
#if defined(__AVX512F__)
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph((__m512)lanes, _MM_FROUND_TO_NEAREST_INT));
#else
    for (int i = 0; i < kLanes; ++i) to[i] = static_cast<c10::Half>(static_cast<float>(lanes[i]));
#endif
  } else {
    std::memcpy(to, &lanes, sizeof(lanes));
  }
}

// The first `count` < 16 lanes; the others are 0.
template <typename T>
inline vec_t<acc_t<T>> load_part(const T* from, int count) {
  T padded[kLanes];
  std::memset(static_cast<void*>(padded), 0, sizeof(padded));
  std::memcpy(static_cast<void*>(padded), from, count * sizeof(T));
  return load<T>(padded);
}

template <typename T>
inline void store_part(T* to, vec_t<acc_t<T>> lanes, int count) {
  T padded[kLanes];
  store<T>(padded, lanes);
  std::memcpy(static_cast<void*>(to), padded, count * sizeof(T));
}

template <typename T>
inline vec_t<acc_t<T>> load_upto(const T* from, int count) {
  return count >= kLanes ? load<T>(from) : load_part<T>(from, count);
}

template <typename T>
inline void store_upto(T* to, vec_t<acc_t<T>> lanes, int count) {
  count >= kLanes ? store<T>(to, lanes) : store_part<T>(to, lanes, count);
}

// ---- reductions, in one fixed order ----

template <typename A, typename V>
inline A sum(V lanes) {
  A parts[kLanes];
  std::memcpy(parts, &lanes, sizeof(lanes));
  for (int width = kLanes / 2; width > 0; width /= 2)
    for (int i = 0; i < width; ++i) parts[i] += parts[i + width];
  return parts[0];
}

template <typename A, typename V>
inline A largest(V lanes) {
  A best = lanes[0];
  for (int i = 1; i < kLanes; ++i) best = lanes[i] > best ? lanes[i] : best;
  return best;
}

// ---- functions ----

// exp to about 1 ulp (Cephes' expf: reduction by ln 2 in two parts, a polynomial of degree 6). 0 below -87.3, where
// float32 turns denormal; at most exp(88.3); NaN stays NaN.
inline f32x16 exp(f32x16 x) {
  const f32x16 low = splat<f32x16>(-87.3f), high = splat<f32x16>(88.3f);
  f32x16 in = x < low ? low : x;
  in = in > high ? high : in;
  const float magic = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer, which the low bits then hold
  f32x16 shifted = in * 1.44269504088896341f + magic;
  i32x16 exponent = (i32x16)shifted - 0x4B400000;
  f32x16 n = shifted - magic;
  f32x16 r = in - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  f32x16 y = r * 1.9875691500e-4f + 1.3981999507e-3f;
  y = y * r + 8.3334519073e-3f;
  y = y * r + 4.1665795894e-2f;
  y = y * r + 1.6666665459e-1f;
  y = y * r + 5.0000001201e-1f;
  y = y * (r * r) + r;
  y = (y + 1.0f) * (f32x16)((exponent + 127) << 23);
  return x < low ? f32x16{} : y;
}

inline f64x16 exp(f64x16 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::exp(x[i]);
  return x;
}

// tanh: by exp, and by its series near 0, where 1 - exp(-2x) would cancel.
inline f32x16 tanh(f32x16 x) {
  f32x16 size = x < 0.0f ? -x : x;
  f32x16 e = exp(-2.0f * size);
  f32x16 far = (1.0f - e) / (1.0f + e);
  f32x16 square = x * x;
  f32x16 series = square * (62.0f / 2835.0f) - 17.0f / 315.0f;
  series = series * square + 2.0f / 15.0f;
  series = series * square - 1.0f / 3.0f;
  series = series * square * x + x;
  f32x16 result = x < 0.0f ? -far : far;
  return size < 0.25f ? series : result;
}

inline f64x16 tanh(f64x16 x) {
  for (int i = 0; i < kLanes; ++i) x[i] = std::tanh(x[i]);
  return x;
}

}  // namespace saccade
