// A block of 16 keys, transposed so that a lane is a key, and the dot products of queries with it.
//
// A score is two chains of multiply-adds over the dims (alternate ones) and their sum: it depends on nothing but its
// query and its key.
#pragma once

#include "vec.h"

namespace saccade {

template <int S, int... L>
inline void exchange(u32x16& a, u32x16& b, std::integer_sequence<int, L...>) {
#if defined(__clang__)
  u32x16 low = __builtin_shufflevector(a, b, (L & S ? 16 + L - S : L)...);
  u32x16 high = __builtin_shufflevector(a, b, (L & S ? 16 + L : L + S)...);
#else
  u32x16 low = __builtin_shuffle(a, b, i32x16{(L & S ? 16 + L - S : L)...});
  u32x16 high = __builtin_shuffle(a, b, i32x16{(L & S ? 16 + L : L + S)...});
#endif
  a = low;
  b = high;
}

template <int S>
inline void exchange_all(u32x16* rows) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i)
    if (!(i & S)) exchange<S>(rows[i], rows[i + S], std::make_integer_sequence<int, kLanes>{});
}

inline void transpose(u32x16* rows) {
  exchange_all<8>(rows);
  exchange_all<4>(rows);
  exchange_all<2>(rows);
  exchange_all<1>(rows);
}

template <typename T>
struct KeyTile {
  using A = acc_t<T>;
  using Item = A;  // what queries and tiles are made of
  static int64_t width(int64_t dims) { return ceil_div(dims, kLanes) * kLanes; }  // items of a query

  static void load_query(const T* query, int64_t dims, Item* to) {
    for (int64_t d = 0; d < dims; d += kLanes) store<A>(to + d, load_upto<T>(query + d, dims - d));
  }

  // keys: 16 rows `stride` apart -> tile [width][16]
  static void load_keys(const T* keys, int64_t stride, int64_t dims, Item* tile) {
    if constexpr (std::is_same_v<T, double>) {
      for (int64_t d = 0; d < width(dims); ++d)
        for (int k = 0; k < kLanes; ++k) tile[d * kLanes + k] = d < dims ? keys[k * stride + d] : 0.0;
    } else {
      for (int64_t d = 0; d < dims; d += kLanes) {
        u32x16 rows[kLanes];
#pragma GCC unroll 16
        for (int k = 0; k < kLanes; ++k) rows[k] = (u32x16)load_upto<T>(keys + k * stride + d, dims - d);
        transpose(rows);
        std::memcpy(tile + d * kLanes, rows, sizeof(rows));
      }
    }
  }

  template <int N>
  static void dot(const Item* tile, const Item* queries, int64_t width, vec_t<A>* scores) {
    vec_t<A> even[N] = {}, odd[N] = {};
    for (int64_t d = 0; d < width; d += 2) {
      const vec_t<A> first = load<A>(tile + d * kLanes), second = load<A>(tile + (d + 1) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        even[i] += first * queries[i * width + d];
        odd[i] += second * queries[i * width + d + 1];
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) scores[i] = even[i] + odd[i];
  }
};

#if defined(__AVX512BF16__)
// Products of bfloat16 pairs straight into float32: half the transposition and half the instructions.
template <>
struct KeyTile<c10::BFloat16> {
  using A = float;
  using Item = uint32_t;  // two neighbouring dims
  static int64_t width(int64_t dims) { return ceil_div(dims, 2 * kLanes) * kLanes; }

  static u32x16 pairs(const c10::BFloat16* from, int64_t count) {
    u32x16 lanes = {};
    if (count >= 2 * kLanes)  // a copy of known size is one load, the other a call
      std::memcpy(&lanes, from, sizeof(lanes));
    else
      std::memcpy(&lanes, from, count * sizeof(c10::BFloat16));
    return lanes;
  }

  static void load_query(const c10::BFloat16* query, int64_t dims, Item* to) {
    for (int64_t d = 0; d < dims; d += 2 * kLanes) {
      u32x16 lanes = pairs(query + d, dims - d);
      std::memcpy(to + d / 2, &lanes, sizeof(lanes));
    }
  }

  static void load_keys(const c10::BFloat16* keys, int64_t stride, int64_t dims, Item* tile) {
    for (int64_t d = 0; d < dims; d += 2 * kLanes) {
      u32x16 rows[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) rows[k] = pairs(keys + k * stride + d, dims - d);
      transpose(rows);
      std::memcpy(tile + d / 2 * kLanes, rows, sizeof(rows));
    }
  }

  template <int N>
  static void dot(const Item* tile, const Item* queries, int64_t width, f32x16* scores) {
    __m512 even[N] = {}, odd[N] = {};
    for (int64_t d = 0; d < width; d += 2) {
      const __m512bh first = (__m512bh)_mm512_loadu_si512(tile + d * kLanes);
      const __m512bh second = (__m512bh)_mm512_loadu_si512(tile + (d + 1) * kLanes);
#pragma GCC unroll 8
      for (int i = 0; i < N; ++i) {
        even[i] = _mm512_dpbf16_ps(even[i], (__m512bh)_mm512_set1_epi32(queries[i * width + d]), first);
        odd[i] = _mm512_dpbf16_ps(odd[i], (__m512bh)_mm512_set1_epi32(queries[i * width + d + 1]), second);
      }
    }
#pragma GCC unroll 8
    for (int i = 0; i < N; ++i) scores[i] = (f32x16)_mm512_add_ps(even[i], odd[i]);
  }
};
#endif

}  // namespace saccade
