// Paged tree attention: every query over the keys that models/batch.py lets it see, pages read in place.
//
// A query's keys are numbered by their *position* on the query's own path: the prefix first, then its ancestors by
// depth. Scores are taken per (query, key), the softmax and the sum over values run in the order of positions, and
// nothing else enters. So a tree node gets the same bits as the same token decoded plainly, in any pages and batch.
#include <atomic>
#include <cstdlib>
#include <limits>
#include <memory>
#include <optional>
#include <vector>

#include "attention.h"
#include "key_tile.h"
#include "tensors.h"

namespace saccade {
namespace {

constexpr int kDotQueries = 8;    // query vectors that share one pass over a key tile
constexpr int kTileVectors = 64;  // query vectors of one task, fewer where the context is long
constexpr int64_t kTileScores = 1 << 20;
constexpr int64_t kValueChunk = 64;  // keys whose values stay in the first-level cache for all vectors

template <typename T>
using Problem = AttentionProblem<T>;

// What one query sees: logical keys [low, visible), then the ancestors `bits` (beyond the prefix) at positions
// base + depth, from position `low` on.
struct Span {
  int64_t low, visible, base;
  uint64_t bits;
  int64_t end;    // one past the last position
  int64_t reach;  // one past the last logical key
};

template <typename T>
Span span_of(const Problem<T>& p, int64_t row, int64_t token) {
  Span s;
  s.visible = p.visible[token];
  s.base = p.tree_base[row];
  s.bits = static_cast<uint64_t>(p.tree_mask[token]);
  s.low = p.window > 0 ? std::max<int64_t>(0, p.positions[token] - p.window + 1) : 0;
  s.low = std::min(std::max(s.low, p.first_key), std::numeric_limits<int64_t>::max() / 2);
  s.end = s.reach = s.visible;
  if (s.bits != 0) {
    s.end = std::max(s.visible, s.base + __builtin_popcountll(s.bits));
    s.reach = std::max(s.visible, s.base + 64 - __builtin_clzll(s.bits));
  }
  s.low = std::min(s.low, s.reach);
  return s;
}

// Calls body(position, logical key) for the ancestors beyond the prefix that the query sees, in order.
template <typename Body>
inline void for_ancestors(const Span& s, int64_t first_key, Body body) {
  int64_t position = s.base;
  for (uint64_t bits = s.bits; bits != 0; bits &= bits - 1, ++position) {
    const int64_t key = s.base + __builtin_ctzll(bits);
    if (position >= s.visible && position >= s.low && key >= first_key) body(position, key);
  }
}

// Memory on cache lines that grows and never shrinks: a thread keeps the most that it needed.
template <typename X>
class Buffer {
 public:
  X* reserve(int64_t count) {
    if (count > size_) {
      size_ = count;
      data_.reset(static_cast<X*>(std::aligned_alloc(64, ceil_div(count * sizeof(X), 64) * 64)));
      if (!data_) throw std::bad_alloc();
    }
    return data_.get();
  }

 private:
  struct Free {
    void operator()(X* data) const { std::free(data); }
  };
  std::unique_ptr<X, Free> data_;
  int64_t size_ = 0;
};

template <typename T>
struct Scratch {
  Buffer<Span> spans;
  Buffer<acc_t<T>> scores, sums, out;
  Buffer<typename KeyTile<T>::Item> queries, tile;
  Buffer<const void*> rows;
};

template <typename T>
class Tile {
  using A = acc_t<T>;
  using V = vec_t<A>;
  using K = KeyTile<T>;

 public:
  Tile(const Problem<T>& problem, int64_t row, int64_t kv_head, int64_t first, int64_t last)
      : p_(problem), row_(row), kv_head_(kv_head), first_(first), queries_(last - first), vectors_(queries_ * p_.group) {}

  void run() {
    thread_local Scratch<T> scratch;
    Span* spans = scratch.spans.reserve(queries_);
    int64_t low = std::numeric_limits<int64_t>::max(), reach = 0;
    for (int64_t q = 0; q < queries_; ++q) {
      spans[q] = span_of(p_, row_, first_ + q);
      low = std::min(low, spans[q].low);
      reach = std::max(reach, spans[q].reach);
    }
    spans_ = spans;
    origin_ = low / kLanes * kLanes;
    stride_ = std::max<int64_t>(ceil_div(reach - origin_, kLanes), 1) * kLanes;
    scores_ = scratch.scores.reserve(vectors_ * stride_);
    sums_ = scratch.sums.reserve(vectors_);
    out_width_ = ceil_div(p_.value_dim, kLanes) * kLanes;
    out_ = scratch.out.reserve(vectors_ * out_width_);
    rows_ = scratch.rows.reserve(stride_ + 64);
    const int64_t width = K::width(p_.key_dim);
    score(scratch.queries.reserve(vectors_ * width), scratch.tile.reserve(kLanes * width), width, reach);
    for (int64_t v = 0; v < vectors_; ++v) softmax(v);
    weigh();
    finish();
  }

 private:
  const Span& span(int64_t vector) const { return spans_[vector / p_.group]; }
  A* scores(int64_t vector, int64_t key) const { return scores_ + vector * stride_ + (key - origin_); }

  // Scores of all vectors with the logical keys [origin, reach), a block of keys at a time.
  void score(typename K::Item* queries, typename K::Item* tile, int64_t width, int64_t reach) {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t head = kv_head_ * p_.group + v % p_.group;
      const T* query = p_.query + (first_ + v / p_.group) * p_.query_token + head * p_.query_head;
      K::load_query(query, p_.key_dim, queries + v * width);
    }
    for (int64_t key = origin_; key < reach; key += kLanes) {
      const int64_t slot = p_.slot(row_, key);
      const T* values = p_.values + slot * p_.value_slot + kv_head_ * p_.value_head;
      for (int i = 0; i < kLanes; ++i) rows_[key - origin_ + i] = values + i * p_.value_slot;
      K::load_keys(p_.keys + slot * p_.key_slot + kv_head_ * p_.key_head, p_.key_slot, p_.key_dim, tile);
      for (int64_t v = 0; v < vectors_;) {
        const int64_t n = std::min<int64_t>(kDotQueries, vectors_ - v);
        const int64_t step = n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
        if (seen(v, v + step, key)) score_some(step, tile, queries + v * width, width, v, key);
        v += step;
      }
    }
  }

  bool seen(int64_t begin, int64_t end, int64_t key) const {
    for (int64_t q = begin / p_.group; q <= (end - 1) / p_.group; ++q)
      if (key < spans_[q].reach && key + kLanes > spans_[q].low) return true;
    return false;
  }

  void score_some(int64_t n, const typename K::Item* tile, const typename K::Item* queries, int64_t width, int64_t v,
                  int64_t key) {
    V dots[kDotQueries];
    switch (n) {
      case 8: K::template dot<8>(tile, queries, width, dots); break;
      case 4: K::template dot<4>(tile, queries, width, dots); break;
      case 2: K::template dot<2>(tile, queries, width, dots); break;
      default: K::template dot<1>(tile, queries, width, dots);
    }
    for (int64_t i = 0; i < n; ++i) {
      V s = dots[i] * p_.scale;
      if (p_.soft_cap != 0) s = p_.soft_cap * tanh(s / p_.soft_cap);
      store<A>(scores(v + i, key), s);
    }
  }

  // Turns scores by logical key into weights by position (not yet divided by their sum).
  void softmax(int64_t v) {
    const Span& s = span(v);
    const A none = -std::numeric_limits<A>::infinity();
    A* at = scores(v, 0);
    const int64_t begin = s.low / kLanes * kLanes, end = ceil_div(s.end, kLanes) * kLanes;
    // a key's position is never above its logical index, so moving in order overwrites nothing that is still needed
    int64_t filled = std::max(s.visible, begin);
    for_ancestors(s, p_.first_key, [&](int64_t position, int64_t key) {
      const A score = at[key];
      for (; filled < position; ++filled) at[filled] = none;
      at[position] = score;
      filled = position + 1;
    });
    for (; filled < end; ++filled) at[filled] = none;
    for (int64_t k = begin; k < s.low; ++k) at[k] = none;

    V most = splat<V>(none);
    for (int64_t k = begin; k < end; k += kLanes) {
      const V lanes = load<A>(at + k);
      most = lanes > most ? lanes : most;
    }
    const A sink = p_.sinks ? p_.sinks[kv_head_ * p_.group + v % p_.group] : none;
    const A top = std::max(largest<A>(most), sink);
    sums_[v] = 0;
    if (top == none) {  // it sees nothing; a NaN among the scores goes on to the output
      bool nan = false;
      for (int64_t k = begin; k < end; ++k) nan |= at[k] != at[k];
      if (!nan) {
        for (int64_t k = begin; k < end; ++k) at[k] = 0;
        return;
      }
    }
    V total = {};
    for (int64_t k = begin; k < end; k += kLanes) {
      const V weights = exp(load<A>(at + k) - top);
      total += weights;
      store<A>(at + k, weights);
    }
    sums_[v] = sum<A>(total);
    if (p_.sinks) sums_[v] += exp(splat<V>(sink - top))[0];
  }

  // out[v] = the values that vector v sees, weighted, added in the order of positions.
  void weigh() {
    std::fill(out_, out_ + vectors_ * out_width_, A{0});
    int64_t end = 0;
    for (int64_t q = 0; q < queries_; ++q) end = std::max(end, spans_[q].visible);
    for (int64_t begin = origin_; begin < end; begin += kValueChunk)
      for (int64_t v = 0; v < vectors_;) {
        const int64_t left = vectors_ - v, step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        weigh_some(v, step, begin, begin + kValueChunk);
        v += step;
      }
    for (int64_t v = 0; v < vectors_; ++v) add_ancestors(v);
  }

  // Adds the prefix keys within [begin, end) to `step` vectors: together those that all of them see.
  void weigh_some(int64_t v, int64_t step, int64_t begin, int64_t end) {
    int64_t low = begin, visible = end;
    for (int64_t i = v; i < v + step; ++i) {
      low = std::max(low, span(i).low);
      visible = std::min(visible, span(i).visible);
    }
    visible = std::max(visible, low);
    for (int64_t i = v; i < v + step; ++i)
      add_values<1>(i, std::max(begin, span(i).low), std::min({low, end, span(i).visible}));
    step == 4 ? add_values<4>(v, low, visible) : step == 2 ? add_values<2>(v, low, visible) : add_values<1>(v, low, visible);
    for (int64_t i = v; i < v + step; ++i) add_values<1>(i, visible, std::min(end, span(i).visible));
  }

  template <int N>
  void add_values(int64_t v, int64_t begin, int64_t end) {
    if (begin < end) add_rows<N>(rows_ + (begin - origin_), end - begin, scores(v, begin), out_ + v * out_width_);
  }

  void add_ancestors(int64_t v) {
    const void** rows = rows_ + stride_;
    int64_t count = 0, start = 0;
    for_ancestors(span(v), p_.first_key, [&](int64_t position, int64_t key) {
      if (count == 0) start = position;
      rows[count++] = rows_[key - origin_];
    });
    if (count > 0) add_rows<1>(rows, count, scores(v, start), out_ + v * out_width_);
  }

  template <int N>
  void add_rows(const void** rows, int64_t count, const A* weights, A* out) {
    constexpr int kWide = std::is_same_v<A, double> ? 2 : 4;
    int64_t d = 0;
    for (; d + kWide * kLanes <= p_.value_dim; d += kWide * kLanes) add_dims<N, kWide, false>(rows, count, weights, out, d);
    for (; d + kLanes <= p_.value_dim; d += kLanes) add_dims<N, 1, false>(rows, count, weights, out, d);
    if (d < p_.value_dim) add_dims<N, 1, true>(rows, count, weights, out, d);
  }

  template <int N, int W, bool Partial>
  void add_dims(const void** rows, int64_t count, const A* weights, A* out, int64_t d) {
    V acc[N][W];
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) acc[i][w] = load<A>(out + i * out_width_ + d + w * kLanes);
    for (int64_t k = 0; k < count; ++k) {
      const T* row = static_cast<const T*>(rows[k]) + d;
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) {
        const V value = Partial ? load_part<T>(row, p_.value_dim - d) : load<T>(row + w * kLanes);
#pragma GCC unroll 4
        for (int i = 0; i < N; ++i) acc[i][w] += value * weights[i * stride_ + k];
      }
    }
#pragma GCC unroll 4
    for (int i = 0; i < N; ++i)
#pragma GCC unroll 4
      for (int w = 0; w < W; ++w) store<A>(out + i * out_width_ + d + w * kLanes, acc[i][w]);
  }

  void finish() {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t head = kv_head_ * p_.group + v % p_.group;
      T* to = p_.out + ((first_ + v / p_.group) * p_.heads + head) * p_.value_dim;
      const A inverse = sums_[v] == 0 ? A{0} : 1 / sums_[v];
      for (int64_t d = 0; d < p_.value_dim; d += kLanes)
        store_upto<T>(to + d, load<A>(out_ + v * out_width_ + d) * inverse, p_.value_dim - d);
    }
  }

  const Problem<T>& p_;
  const int64_t row_, kv_head_, first_, queries_, vectors_;
  const Span* spans_ = nullptr;
  A *scores_ = nullptr, *sums_ = nullptr, *out_ = nullptr;
  const void** rows_ = nullptr;  // value row of each logical key from origin_ on, then 64 more for a query's ancestors
  int64_t origin_ = 0, stride_ = 0, out_width_ = 0;
};

}  // namespace

template <typename T>
AttentionPlan plan_attention(const AttentionProblem<T>& p, int64_t rows) {
  AttentionPlan plan{{}, 0};
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t begin = p.row_starts[row], end = p.row_starts[row + 1];
    int64_t reach = 1;
    for (int64_t token = begin; token < end; ++token) reach = std::max(reach, span_of(p, row, token).reach);
    const int64_t vectors = std::clamp<int64_t>(kTileScores / reach, kDotQueries, kTileVectors);
    const int64_t step = std::max<int64_t>(1, vectors / p.group);
    for (int64_t head = 0; head < p.kv_heads; ++head)
      for (int64_t first = begin; first < end; first += step)
        plan.tasks.push_back({row, head, first, std::min(first + step, end)});
    plan.cost += reach * p.kv_heads * ((end - begin) * p.group + 2) * (p.key_dim + p.value_dim) / 64;
  }
  return plan;
}

template <typename T>
void run_attention(const AttentionProblem<T>& p, const AttentionTask& task) {
  Tile<T>(p, task.row, task.kv_head, task.first, task.last).run();
}

template AttentionPlan plan_attention(const AttentionProblem<float>&, int64_t);
template AttentionPlan plan_attention(const AttentionProblem<c10::BFloat16>&, int64_t);
template void run_attention(const AttentionProblem<float>&, const AttentionTask&);
template void run_attention(const AttentionProblem<c10::BFloat16>&, const AttentionTask&);

namespace {

template <typename T>
void attend_typed(const Problem<T>& p, int64_t rows) {
  const AttentionPlan plan = plan_attention(p, rows);
  std::atomic<size_t> next{0};  // rows differ in length: threads take the next task when they are free
  parallel_tasks(std::min<int64_t>(at::get_num_threads(), plan.tasks.size()), plan.cost, [&](int64_t) {
    for (size_t i = next++; i < plan.tasks.size(); i = next++) run_attention(p, plan.tasks[i]);
  });
}

}  // namespace

at::Tensor attend(const at::Tensor& query, const at::Tensor& keys, const at::Tensor& values, const at::Tensor& visible,
                  const at::Tensor& tree_mask, const at::Tensor& positions, const at::Tensor& row_starts,
                  const at::Tensor& tree_base, const at::Tensor& page_table, const std::optional<at::Tensor>& sinks,
                  double scale, std::optional<double> soft_cap, std::optional<int64_t> window, int64_t first_key) {
  const int64_t tokens = query.size(0), heads = query.size(1), kv_heads = keys.size(1), rows = tree_base.size(0);
  TORCH_CHECK(query.dim() == 3 && keys.dim() == 3 && values.dim() == 3, "attend: query, keys and values must be 3-D");
  TORCH_CHECK(keys.scalar_type() == query.scalar_type() && values.scalar_type() == query.scalar_type(),
              "attend: query is ", query.scalar_type(), ", the cache ", keys.scalar_type(), " and ", values.scalar_type());
  TORCH_CHECK(query.stride(2) == 1 && keys.stride(2) == 1 && values.stride(2) == 1, "attend: the last dim must be dense");
  TORCH_CHECK(heads % kv_heads == 0 && values.size(1) == kv_heads && keys.size(2) == query.size(2),
              "attend: heads or dims of query ", query.sizes(), ", keys ", keys.sizes(), " and values ", values.sizes());
  TORCH_CHECK(keys.size(0) % kLanes == 0, "attend: the cache must hold whole pages");
  TORCH_CHECK(visible.numel() == tokens && tree_mask.numel() == tokens && positions.numel() == tokens &&
                  row_starts.numel() == rows + 1 && page_table.size(0) == rows,
              "attend: the batch's tensors do not fit together");
  const int64_t value_dim = values.size(2);
  at::Tensor out = empty({tokens, heads, value_dim}, query.scalar_type());
  for_floating(query.scalar_type(), "attend", [&](auto type) {
    using T = decltype(type);
    at::Tensor sink;
    if (sinks) sink = sinks->to(c10::CppTypeToScalarType<acc_t<T>>::value).contiguous();
    TORCH_CHECK(!sinks || sink.numel() == heads, "attend: sinks must be [", heads, "]");
    attend_typed<T>(
        {query.const_data_ptr<T>(), keys.const_data_ptr<T>(), values.const_data_ptr<T>(), out.mutable_data_ptr<T>(),
         sinks ? sink.const_data_ptr<acc_t<T>>() : nullptr, index_data<int32_t>(visible, "visible"),
         index_data<int32_t>(row_starts, "row_starts"), index_data<int32_t>(tree_base, "tree_base"),
         index_data<int32_t>(page_table, "page_table"), index_data<int64_t>(tree_mask, "tree_mask"),
         index_data<int64_t>(positions, "positions"), query.stride(0), query.stride(1), keys.stride(0), keys.stride(1),
         values.stride(0), values.stride(1), page_table.size(1), heads, kv_heads, heads / kv_heads, keys.size(2), value_dim,
         static_cast<acc_t<T>>(scale), static_cast<acc_t<T>>(soft_cap.value_or(0)), window.value_or(0), first_key},
        rows);
  });
  return out;
}

}  // namespace saccade
