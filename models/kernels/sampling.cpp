// Keyed Gumbel noise, and the best ids of logits plus noise.
//
// Compiled with -ffp-contract=off: scores must have the bits that PyTorch's separate operations give, or the sampler's
// paths would disagree on near ties.
#include <cmath>
#include <limits>
#include <vector>

#include "tensors.h"
#include "vec.h"

namespace saccade {
namespace {

using f64x8 = double __attribute__((vector_size(64)));
using i64x8 = int64_t __attribute__((vector_size(64)));
using u64x8 = uint64_t __attribute__((vector_size(64)));

constexpr uint64_t kLow = 0xffffffff;

// Philox4x32-10 (Salmon et al., SC 2011), eight counters at a time; words are the low halves of 64-bit lanes.
void philox(u64x8* counter, u64x8 key0, u64x8 key1) {
  for (int round = 0; round < 10; ++round) {
    const u64x8 product0 = counter[0] * 0xD2511F53ull, product1 = counter[2] * 0xCD9E8D57ull;
    counter[0] = (product1 >> 32) ^ counter[1] ^ key0;
    counter[2] = (product0 >> 32) ^ counter[3] ^ key1;
    counter[1] = product1 & kLow;
    counter[3] = product0 & kLow;
    key0 = (key0 + 0x9E3779B9ull) & kLow;
    key1 = (key1 + 0xBB67AE85ull) & kLow;
  }
}

// a * b + c in one rounding where the machine can; noise is rounded to float32 in the end, so either does.
inline f64x8 fused(f64x8 a, f64x8 b, f64x8 c) {
#if defined(__AVX512F__)
  return (f64x8)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
  return a * b + c;
#endif
}

inline f64x8 all(double value) { return value - f64x8{}; }

// log of positive normal doubles to about 1 ulp, near 1 too (fdlibm's e_log: x = 2^k (1 + f), s = f / (2 + f)).
f64x8 log(f64x8 x) {
  i64x8 bits = (i64x8)x - 0x3fe6a09e667f3bcdll;  // sqrt(1/2), so that 1 + f lies in [sqrt(1/2), sqrt(2))
  const i64x8 exponent = bits >> 52;
  const f64x8 f = (f64x8)((bits & 0x000fffffffffffffll) + 0x3fe6a09e667f3bcdll) - 1.0;
  const f64x8 k = __builtin_convertvector(exponent, f64x8);
  const f64x8 s = f / (2.0 + f), z = s * s, w = z * z, half = 0.5 * f * f;
  const f64x8 even = w * fused(w, fused(w, all(1.531383769920937332e-01), all(2.222219843214978396e-01)),
                               all(3.999999999940941908e-01));
  const f64x8 odd = z * fused(w, fused(w, fused(w, all(1.479819860511658591e-01), all(1.818357216161805012e-01)),
                                       all(2.857142874366239149e-01)),
                              all(6.666666666666735130e-01));
  const f64x8 low = fused(s, half + even + odd, k * 1.90821492927058770002e-10);
  return fused(k, all(6.93147180369123816490e-01), f - (half - low));
}

// Noise of the ids [first, first + 32): -log(-log1p(-u)) with u = (bits + 1/2) 2^-32. 1 - u is exact in float64.
void gumbel_block(uint64_t seed, uint64_t position, uint64_t choice, int64_t first, float* out) {
  const u64x8 zero = {}, lane = {0, 1, 2, 3, 4, 5, 6, 7};
  u64x8 counter[4] = {zero + (first / 4) + lane, zero + (position & kLow), zero + (choice & kLow), zero};
  philox(counter, zero + (seed & kLow), zero + (seed >> 32));
  for (int word = 0; word < 4; ++word) {
    const f64x8 bits = __builtin_convertvector((i64x8)counter[word], f64x8);
    const f64x8 g = -log(-log(1.0 - (bits + 0.5) * 0x1p-32));
    for (int i = 0; i < 8; ++i) out[4 * i + word] = static_cast<float>(g[i]);
  }
}

}  // namespace

at::Tensor philox_bits(const at::Tensor& counters, const at::Tensor& keys) {
  const int64_t count = counters.size(0);
  TORCH_CHECK(counters.dim() == 2 && counters.size(1) == 4 && keys.dim() == 2 && keys.size(0) == count && keys.size(1) == 2,
              "philox_bits: expected counters [M, 4] and keys [M, 2]");
  at::Tensor out = empty({count, 4}, at::kLong);
  const int64_t *counter = index_data<int64_t>(counters, "counters"), *key = index_data<int64_t>(keys, "keys");
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for (int64_t row = 0; row < count; ++row) {
    u64x8 words[4], zero = {};
    for (int i = 0; i < 4; ++i) words[i] = zero + (static_cast<uint64_t>(counter[row * 4 + i]) & kLow);
    philox(words, zero + (static_cast<uint64_t>(key[row * 2]) & kLow), zero + (static_cast<uint64_t>(key[row * 2 + 1]) & kLow));
    for (int i = 0; i < 4; ++i) to[row * 4 + i] = words[i][0];
  }
  return out;
}

// Row places[i] of the bank [N, V] becomes the noise of (seeds[i], positions[i], choices[i]).
void fill_noise_rows(const at::Tensor& bank, at::IntArrayRef places, at::IntArrayRef seeds, at::IntArrayRef positions,
                     at::IntArrayRef choices) {
  TORCH_CHECK(bank.dim() == 2 && (bank.stride(1) == 1 || bank.size(1) <= 1), "fill_noise_rows: the bank must be [N, V], ids dense");
  const int64_t rows = static_cast<int64_t>(places.size()), ids = bank.size(1), stride = bank.stride(0);
  TORCH_CHECK(static_cast<int64_t>(seeds.size()) == rows && static_cast<int64_t>(positions.size()) == rows &&
                  static_cast<int64_t>(choices.size()) == rows,
              "fill_noise_rows: seeds, positions and choices must be [", rows, "]");
  for (const int64_t place : places)
    TORCH_CHECK_INDEX(place >= 0 && place < bank.size(0), "fill_noise_rows: place ", place, " of ", bank.size(0));
  float* to = bank.mutable_data_ptr<float>();
  constexpr int64_t kBlock = 32, kChunk = 4096;
  const int64_t chunks = ceil_div(ids, kChunk);
  parallel_tasks(rows * chunks, rows * ids * 4, [&](int64_t task) {
    const int64_t row = task / chunks, begin = task % chunks * kChunk, end = std::min(begin + kChunk, ids);
    float* noise = to + places[row] * stride;
    float partial[kBlock];
    for (int64_t id = begin; id < end; id += kBlock) {
      const bool whole = id + kBlock <= end;
      gumbel_block(seeds[row], positions[row], choices[row], id, whole ? noise + id : partial);
      if (!whole) std::copy(partial, partial + (end - id), noise + id);
    }
  });
}

// Temperature and row of the noise bank of nodes, from those of their rows: see SamplingOps.of_nodes.
std::tuple<at::Tensor, at::Tensor> node_parameters(const at::Tensor& temperature, const at::Tensor& first_noise,
                                                   const at::Tensor& position, const at::Tensor& row,
                                                   const at::Tensor& depth, int64_t ring) {
  const int64_t nodes = row.numel(), rows = temperature.numel();
  TORCH_CHECK(depth.numel() == nodes && first_noise.numel() == rows && position.numel() == rows && ring >= 1,
              "node_parameters: expected temperature, first_noise and position [S], row and depth [W]");
  at::Tensor warmth = empty({nodes}, at::kFloat), place = empty({nodes}, at::kLong);
  const float* temperatures = index_data<float>(temperature, "temperature");
  const int64_t *first = index_data<int64_t>(first_noise, "first_noise"), *next = index_data<int64_t>(position, "position");
  const int64_t *of = index_data<int64_t>(row, "row"), *below = index_data<int64_t>(depth, "depth");
  float* to = warmth.mutable_data_ptr<float>();
  int64_t* at = place.mutable_data_ptr<int64_t>();
  for (int64_t node = 0; node < nodes; ++node) {
    const int64_t r = of[node];
    TORCH_CHECK_INDEX(r >= 0 && r < rows, "node_parameters: row ", r, " of ", rows);
    to[node] = temperatures[r];
    at[node] = first[r] < 0 ? -1 : first[r] + (next[r] + below[node]) % ring;
  }
  return {warmth, place};
}

namespace {

enum Formula { kPlain, kDivide, kScale };  // x; x / T + g; x + T * g

template <typename T>
struct Best {
  T value;
  int64_t id;
};

constexpr int64_t kNotAToken = -2;  // NOT_A_TOKEN of decoding/sampling_ops.py

// The token of a draw: none where the best of the logits is no finite number.
template <typename T>
int64_t drawn(const Best<T>& best) {
  return std::isfinite(best.value) ? best.id : kNotAToken;
}

template <typename T>
inline T score(T x, T temperature, T noise, Formula formula) {
  return formula == kPlain ? x : formula == kDivide ? x / temperature + noise : x + temperature * noise;
}

// Sixteen of them, with the same bits.
template <typename T, Formula F>
inline vec_t<T> scores(const T* x, T temperature, const float* noise) {
  const vec_t<T> values = load(x);
  if constexpr (F == kPlain) return values;
  else if constexpr (F == kDivide) return values / temperature + __builtin_convertvector(load(noise), vec_t<T>);
  else return values + temperature * __builtin_convertvector(load(noise), vec_t<T>);
}

// Inserts behind all that are at least as good: equal values stay in the order of ids. NaN counts as -inf.
template <typename T>
inline void insert(Best<T>* best, int64_t& count, int64_t k, T value, int64_t id) {
  if (!(value == value)) value = -std::numeric_limits<T>::infinity();
  if (count == k && !(value > best[k - 1].value)) return;
  int64_t at = count < k ? count++ : k - 1;
  for (; at > 0 && value > best[at - 1].value; --at) best[at] = best[at - 1];
  best[at] = {value, id};
}

// The k best of the ids [begin, end), descending, lowest id first among equals. Returns how many there are. `best` has
// those of lower ids already, so many.
template <typename T, Formula F>
int64_t scan(const T* logits, const float* noise, T temperature, int64_t begin, int64_t end, int64_t k, Best<T>* best,
             int64_t count = 0) {
  constexpr int64_t kBlock = 128, kPiece = 16;
  int64_t id = begin;
  T values[kBlock];
  for (; id + kBlock <= end; id += kBlock) {
    const T bar = count == k ? best[k - 1].value : -std::numeric_limits<T>::infinity();
    int above = count < k;
    for (int64_t i = 0; i < kBlock; ++i) {
      values[i] = score<T>(logits[id + i], temperature, F == kPlain ? 0 : noise[id + i], F);
      above |= values[i] > bar;
    }
    if (!above) continue;
    // about k ln(V / k) values of a row raise the bar; they are looked for in pieces that vectors can pass over
    for (int64_t piece = 0; piece < kBlock; piece += kPiece) {
      const T now = count == k ? best[k - 1].value : -std::numeric_limits<T>::infinity();
      int higher = count < k;
      for (int64_t i = piece; i < piece + kPiece; ++i) higher |= values[i] > now;
      if (higher)
        for (int64_t i = piece; i < piece + kPiece; ++i) insert<T>(best, count, k, values[i], id + i);
    }
  }
  for (; id < end; ++id) insert<T>(best, count, k, score<T>(logits[id], temperature, F == kPlain ? 0 : noise[id], F), id);
  return count;
}

// Inserts a number that is one, by value and id.
template <typename T>
inline void insert_in_order(Best<T>* best, int64_t& count, int64_t k, T value, int64_t id) {
  const auto behind = [&](const Best<T>& other) { return value > other.value || (value == other.value && id < other.id); };
  if (count == k && !behind(best[k - 1])) return;
  int64_t at = count < k ? count++ : k - 1;
  for (; at > 0 && behind(best[at - 1]); --at) best[at] = best[at - 1];
  best[at] = {value, id};
}

// The same as `scan`, for several best of many ids: of disjoint strides of ids the maxima come first, without a branch;
// what is below the k-th largest of these is not among the k best, so few strides need to be looked through.
template <typename T, Formula F>
int64_t scan_strides(const T* logits, const float* noise, T temperature, int64_t begin, int64_t end, int64_t k,
                     Best<T>* best) {
  constexpr int64_t kLength = 64, kGroup = kLanes * kLength, kMostGroups = 16;  // a stride has every kLanes-th id of a group
  const int64_t groups = std::min((end - begin) / kGroup, kMostGroups), rest = begin + groups * kGroup;
  if (k == 1 || groups * kLanes < 4 * k) return scan<T, F>(logits, noise, temperature, begin, end, k, best);
  const auto at = [&](int64_t id) { return score<T>(logits[id], temperature, F == kPlain ? 0 : noise[id], F); };
  T maxima[kMostGroups * kLanes];
  for (int64_t group = 0; group < groups; ++group) {
    vec_t<T> highest = splat<vec_t<T>>(-std::numeric_limits<T>::infinity());
    for (int64_t id = begin + group * kGroup; id < begin + (group + 1) * kGroup; id += kLanes) {
      const vec_t<T> values = scores<T, F>(logits + id, temperature, noise + (F == kPlain ? 0 : id));
      highest = values > highest ? values : highest;
    }
    std::memcpy(maxima + group * kLanes, &highest, sizeof(highest));
  }
  int64_t count = 0;
  for (int64_t stride = 0; stride < groups * kLanes; ++stride) insert<T>(best, count, k, maxima[stride], stride);
  const T bar = best[k - 1].value;
  if (bar == -std::numeric_limits<T>::infinity()) return scan<T, F>(logits, noise, temperature, begin, end, k, best);
  count = 0;
  for (int64_t stride = 0; stride < groups * kLanes; ++stride) {
    if (maxima[stride] < bar) continue;
    const int64_t first = begin + stride / kLanes * kGroup + stride % kLanes;
    for (int64_t id = first; id < first + kGroup; id += kLanes)
      if (const T value = at(id); value >= bar) insert_in_order<T>(best, count, k, value, id);
  }
  return scan<T, F>(logits, noise, temperature, rest, end, k, best, count);
}

template <typename T>
int64_t scan_by(Formula formula, const T* logits, const float* noise, T temperature, int64_t begin, int64_t end, int64_t k,
                Best<T>* best) {
  if (noise == nullptr) return scan_strides<T, kPlain>(logits, noise, temperature, begin, end, k, best);
  if (formula == kDivide) return scan_strides<T, kDivide>(logits, noise, temperature, begin, end, k, best);
  return scan_strides<T, kScale>(logits, noise, temperature, begin, end, k, best);
}

// Calls take(row, list of k) for every row of logits [W, V]. A long row is scanned in parts, merged in their order.
template <typename T, typename Take>
void best_of_rows(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& noise,
                  const at::Tensor& noise_row, int64_t k, Formula formula, Take take) {
  const int64_t rows = logits.size(0), ids = logits.size(1);
  TORCH_CHECK(logits.dim() == 2 && noise.dim() == 2 && temperature.numel() == rows && noise_row.numel() == rows,
              "expected logits [W, V], noise [M, V], temperature and noise_row [W]");
  TORCH_CHECK(logits.stride(1) == 1 && (noise.numel() == 0 || (noise.stride(1) == 1 && noise.size(1) >= ids)),
              "ids must be dense, and noise as wide as the logits");
  TORCH_CHECK(k >= 1 && k <= ids, "k must be from 1 to ", ids);
  const T* from = logits.const_data_ptr<T>();
  const float* table = noise.const_data_ptr<float>();
  const float* warmth = index_data<float>(temperature, "temperature");
  const int64_t* source = index_data<int64_t>(noise_row, "noise_row");
  for (int64_t row = 0; row < rows; ++row)
    TORCH_CHECK_INDEX(source[row] < noise.size(0), "noise_row ", source[row], " of ", noise.size(0));
  constexpr int64_t kPart = 16384;
  const int64_t parts = ceil_div(ids, kPart);
  std::vector<Best<T>> lists(rows * parts * k);
  std::vector<int64_t> counts(rows * parts);
  parallel_tasks(rows * parts, rows * ids / 8, [&](int64_t task) {
    const int64_t row = task / parts, begin = task % parts * kPart;
    const float* drawn = source[row] < 0 ? nullptr : table + source[row] * noise.stride(0);
    counts[task] = scan_by<T>(formula, from + row * logits.stride(0), drawn, warmth[row], begin, std::min(begin + kPart, ids),
                              k, lists.data() + task * k);
  });
  std::vector<Best<T>> merged(k);
  for (int64_t row = 0; row < rows; ++row) {
    int64_t count = 0;
    for (int64_t part = row * parts; part < (row + 1) * parts; ++part)
      for (int64_t i = 0; i < counts[part]; ++i)
        insert<T>(merged.data(), count, k, lists[part * k + i].value, lists[part * k + i].id);
    take(row, merged.data());
  }
}

template <typename Body>
void for_logits(const at::Tensor& logits, const char* op, Body body) {
  if (logits.scalar_type() == at::kFloat) return body(float{});
  TORCH_CHECK(logits.scalar_type() == at::kDouble, op, ": logits are ", logits.scalar_type());
  body(double{});
}

}  // namespace

at::Tensor best_ids(const at::Tensor& logits) {
  const int64_t rows = logits.size(0), ids = logits.size(1);
  TORCH_CHECK(logits.dim() == 2 && logits.stride(1) == 1 && ids > 0, "best_ids: expected logits [W, V], ids dense");
  at::Tensor out = empty({rows}, at::kLong);
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for_logits(logits, "best_ids", [&](auto type) {
    using T = decltype(type);
    const T* from = logits.const_data_ptr<T>();
    parallel_tasks(rows, rows * ids / 8, [&](int64_t row) {
      Best<T> best = {0, 0};
      scan<T, kPlain>(from + row * logits.stride(0), nullptr, 0, 0, ids, 1, &best);
      to[row] = drawn(best);
    });
  });
  return out;
}

at::Tensor sample_rows(const at::Tensor& logits, const at::Tensor& temperature, const at::Tensor& noise,
                       const at::Tensor& noise_row) {
  at::Tensor out = empty({logits.size(0)}, at::kLong);
  int64_t* to = out.mutable_data_ptr<int64_t>();
  for_logits(logits, "sample_rows", [&](auto type) {
    using T = decltype(type);
    best_of_rows<T>(logits, temperature, noise, noise_row, 1, kDivide,
                    [&](int64_t row, const Best<T>* best) { to[row] = drawn(best[0]); });
  });
  return out;
}

std::tuple<at::Tensor, at::Tensor> topk_rows(const at::Tensor& logits, const at::Tensor& temperature,
                                             const at::Tensor& noise, const at::Tensor& noise_row, int64_t k, bool divide) {
  at::Tensor values = empty({logits.size(0), k}, logits.scalar_type()), ids = empty({logits.size(0), k}, at::kLong);
  for_logits(logits, "topk_rows", [&](auto type) {
    using T = decltype(type);
    T* value = values.mutable_data_ptr<T>();
    int64_t* id = ids.mutable_data_ptr<int64_t>();
    best_of_rows<T>(logits, temperature, noise, noise_row, k, divide ? kDivide : kScale, [&](int64_t row, const Best<T>* best) {
      for (int64_t i = 0; i < k; ++i) {
        value[row * k + i] = best[i].value;
        id[row * k + i] = best[i].id;
      }
    });
  });
  return {values, ids};
}

// The same without noise: the k largest.
std::tuple<at::Tensor, at::Tensor> top_rows(const at::Tensor& logits, int64_t k) {
  const int64_t rows = logits.size(0);
  const at::Tensor temperature = empty({rows}, at::kFloat), noise_row = empty({rows}, at::kLong);
  std::fill_n(temperature.mutable_data_ptr<float>(), rows, 1.0f);
  std::fill_n(noise_row.mutable_data_ptr<int64_t>(), rows, int64_t{-1});
  return topk_rows(logits, temperature, empty({0, 1}, at::kFloat), noise_row, k, false);
}

namespace {

// Sum of exp((z - top) / tau) over a row, z = x + T * g (x alone without noise).
template <typename T, bool Noisy>
double partition(const T* logits, const float* noise, T temperature, int64_t ids, T top, float tau) {
  f32x16 total = {};
  const float scale = 1.0f / tau;
  int64_t id = 0;
  for (; id + kLanes <= ids; id += kLanes) {
    float scores[kLanes];
    for (int64_t i = 0; i < kLanes; ++i)
      scores[i] = static_cast<float>((Noisy ? logits[id + i] + temperature * noise[id + i] : logits[id + i]) - top) * scale;
    f32x16 lanes;
    std::memcpy(&lanes, scores, sizeof(lanes));
    total += exp(lanes);
  }
  double all = sum<float>(total);
  for (; id < ids; ++id)
    all += std::exp(static_cast<float>((Noisy ? logits[id] + temperature * noise[id] : logits[id]) - top) * scale);
  return all;
}

}  // namespace

// The k best ids of x + T * g and softmax((x + T * g) / tau) at them: a drafter's guesses and its confidence.
std::tuple<at::Tensor, at::Tensor> guess_rows(const at::Tensor& logits, const at::Tensor& temperature,
                                              const at::Tensor& noise, const at::Tensor& noise_row, int64_t k, double tau) {
  const auto [values, ids] = topk_rows(logits, temperature, noise, noise_row, k, false);
  const int64_t rows = logits.size(0), vocab = logits.size(1);
  at::Tensor confidence = empty({rows, k}, at::kFloat);
  float* to = confidence.mutable_data_ptr<float>();
  const float* warmth = temperature.const_data_ptr<float>();
  const int64_t* source = noise_row.const_data_ptr<int64_t>();
  const float* table = noise.const_data_ptr<float>();
  for_logits(logits, "guess_rows", [&](auto type) {
    using T = decltype(type);
    const T *from = logits.const_data_ptr<T>(), *best = values.template const_data_ptr<T>();
    parallel_tasks(rows, rows * vocab / 4, [&](int64_t row) {
      const float* drawn = source[row] < 0 ? nullptr : table + source[row] * noise.stride(0);
      const T top = best[row * k];
      const T* x = from + row * logits.stride(0);
      const double all = drawn ? partition<T, true>(x, drawn, warmth[row], vocab, top, tau)
                               : partition<T, false>(x, drawn, warmth[row], vocab, top, tau);
      for (int64_t i = 0; i < k; ++i)
        to[row * k + i] = static_cast<float>(std::exp(static_cast<double>(best[row * k + i] - top) / tau) / all);
    });
  });
  return {ids, confidence};
}

}  // namespace saccade
