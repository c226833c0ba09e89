// One task of paged tree attention: every query over the keys that models/batch.py lets it see, pages read in place.
//
// A query's keys are numbered by their *position* on the query's own path: the prefix first, then its ancestors by
// depth. Scores are taken per (query, key); the softmax and the sum over values run in the order of positions, chunk by
// chunk (kChunk), and nothing else enters. So a tree node gets the same bits as the same token decoded plainly, in any
// pages and batch, on any number of threads.
#pragma once

#include <cstdlib>
#include <limits>
#include <memory>

#include "attention.h"
#include "key_tile.h"

namespace saccade {

constexpr int kDotQueries = 8;    // query vectors that share one pass over a key tile
constexpr int64_t kMaxTree = 64;     // nodes of a tree
constexpr int64_t kValueBlock = 64;  // keys whose values stay in the first-level cache for all vectors

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
  Buffer<acc_t<T>> scores, merged, partial;
  Buffer<typename KeyTile<T>::Item> queries, tile;
  Buffer<const void*> rows;
};

// What vectors have seen of their keys: out [vectors, width] is to be divided by `sums`, the weights being
// exp(score - top). A vector that has seen nothing has sum 0 and top -infinity.
template <typename A>
struct Partial {
  A *tops, *sums, *out;

  static int64_t size(int64_t vectors, int64_t width) { return ceil_div(2 * vectors, kLanes) * kLanes + vectors * width; }

  static Partial at(A* memory, int64_t vectors) {
    return {memory, memory + vectors, memory + ceil_div(2 * vectors, kLanes) * kLanes};
  }

  bool empty(int64_t vector) const { return sums[vector] == 0 && tops[vector] == -std::numeric_limits<A>::infinity(); }
};

template <typename T>
class Tile {
  using A = acc_t<T>;
  using V = vec_t<A>;
  using K = KeyTile<T>;

 public:
  Tile(const Problem<T>& problem, const AttentionTask& task)
      : p_(problem),
        task_(task),
        queries_(task.last - task.first),
        vectors_(queries_ * p_.group),
        out_width_(ceil_div(p_.value_dim, kLanes) * kLanes),
        key_width_(K::width(p_.key_dim)) {}

  void run() {
    thread_local Scratch<T> scratch;
    Span* spans = scratch.spans.reserve(queries_);
    for (int64_t q = 0; q < queries_; ++q) {
      spans[q] = span_of(p_, task_.row, task_.first + q);
      low_ = std::min(low_, spans[q].low);
      reach_ = std::max(reach_, spans[q].reach);
      end_ = std::max(end_, spans[q].end);
    }
    spans_ = spans;
    const int64_t widest = std::min(kChunk + 2 * kMaxTree, ceil_div(reach_, kLanes) * kLanes);
    stride_ = std::max<int64_t>(widest, kLanes);
    scores_ = scratch.scores.reserve(vectors_ * stride_);
    rows_ = scratch.rows.reserve(stride_ + 64);
    tile_ = scratch.tile.reserve(kLanes * key_width_);
    load_queries(scratch.queries.reserve(vectors_ * key_width_));
    const int64_t size = Partial<A>::size(vectors_, out_width_);
    task_.split ? run_chunk(size) : run_all(scratch, size);
  }

 private:
  // All keys, one chunk after the other.
  void run_all(Scratch<T>& scratch, int64_t size) {
    const Partial<A> merged = Partial<A>::at(scratch.merged.reserve(size), vectors_);
    const int64_t first = low_ / kChunk, last = std::max(ceil_div(end_, kChunk), first + 1);
    attend(first, merged);
    for (int64_t chunk = first + 1; chunk < last; ++chunk) {
      const Partial<A> partial = Partial<A>::at(scratch.partial.reserve(size), vectors_);
      attend(chunk, partial);
      merge(merged, partial);
    }
    finish(merged);
  }

  // One chunk; the last one to be done merges all of them, in their order.
  void run_chunk(int64_t size) {
    SplitQueries& split = *task_.split;
    const auto memory = (reinterpret_cast<uintptr_t>(split.results.get()) + 63) / 64 * 64;
    const auto part = [&](int64_t chunk) { return Partial<A>::at(reinterpret_cast<A*>(memory) + chunk * size, vectors_); };
    attend(task_.chunk, part(task_.chunk));
    if (split.open.fetch_sub(1, std::memory_order_acq_rel) > 1) return;
    for (int64_t chunk = 1; chunk < split.chunks; ++chunk) merge(part(0), part(chunk));
    finish(part(0));
    split.open.store(split.chunks, std::memory_order_relaxed);  // for the next layer
  }

  // What the vectors see at the positions of one chunk.
  void attend(int64_t chunk, const Partial<A>& to) {
    from_ = chunk * kChunk;
    to_ = from_ + kChunk;
    // nodes stand up to 63 keys behind their positions
    const int64_t base = spans_[0].base, reach = to_ > base ? reach_ : std::min(reach_, to_);
    origin_ = std::max(low_, from_) / kLanes * kLanes;
    score(std::max(reach, origin_));
    for (int64_t v = 0; v < vectors_; ++v) softmax(v, to);
    weigh(to);
  }

  void merge(const Partial<A>& into, const Partial<A>& next) {
    for (int64_t v = 0; v < vectors_; ++v) {
      if (next.empty(v)) continue;
      A *sum = into.out + v * out_width_, *added = next.out + v * out_width_;
      if (into.empty(v)) {
        into.tops[v] = next.tops[v];
        into.sums[v] = next.sums[v];
        std::copy_n(added, out_width_, sum);
        continue;
      }
      const A top = std::max(into.tops[v], next.tops[v]);
      const A old_scale = exp(splat<V>(into.tops[v] - top))[0], scale = exp(splat<V>(next.tops[v] - top))[0];
      into.tops[v] = top;
      into.sums[v] = into.sums[v] * old_scale + next.sums[v] * scale;
      for (int64_t d = 0; d < out_width_; d += kLanes) {
        const V kept = load<A>(sum + d) * old_scale;
        store<A>(sum + d, kept + load<A>(added + d) * scale);
      }
    }
  }

  const Span& span(int64_t vector) const { return spans_[vector / p_.group]; }
  A* scores(int64_t vector, int64_t key) const { return scores_ + vector * stride_ + (key - origin_); }

  void load_queries(typename K::Item* queries) {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t head = task_.kv_head * p_.group + v % p_.group;
      const T* query = p_.query + (task_.first + v / p_.group) * p_.query_token + head * p_.query_head;
      K::load_query(query, p_.key_dim, queries + v * key_width_);
    }
    loaded_ = queries;
  }

  // Scores of all vectors with the logical keys [origin, reach), a block of keys at a time.
  void score(int64_t reach) {
    for (int64_t key = origin_; key < reach; key += kLanes) {
      const int64_t slot = p_.slot(task_.row, key);
      const T* values = p_.values + slot * p_.value_slot + task_.kv_head * p_.value_head;
      for (int i = 0; i < kLanes; ++i) rows_[key - origin_ + i] = values + i * p_.value_slot;
      K::load_keys(p_.keys + slot * p_.key_slot + task_.kv_head * p_.key_head, p_.key_slot, p_.key_dim, tile_);
      for (int64_t v = 0; v < vectors_;) {
        const int64_t n = std::min<int64_t>(kDotQueries, vectors_ - v);
        const int64_t step = n >= 8 ? 8 : n >= 4 ? 4 : n >= 2 ? 2 : 1;
        if (seen(v, v + step, key)) score_some(step, v, key);
        v += step;
      }
    }
  }

  bool seen(int64_t begin, int64_t end, int64_t key) const {
    for (int64_t q = begin / p_.group; q <= (end - 1) / p_.group; ++q)
      if (key < spans_[q].reach && key + kLanes > spans_[q].low) return true;
    return false;
  }

  void score_some(int64_t n, int64_t v, int64_t key) {
    const typename K::Item* queries = loaded_ + v * key_width_;
    V dots[kDotQueries];
    switch (n) {
      case 8: K::template dot<8>(tile_, queries, key_width_, dots); break;
      case 4: K::template dot<4>(tile_, queries, key_width_, dots); break;
      case 2: K::template dot<2>(tile_, queries, key_width_, dots); break;
      default: K::template dot<1>(tile_, queries, key_width_, dots);
    }
    for (int64_t i = 0; i < n; ++i) {
      V s = dots[i] * p_.scale;
      if (p_.soft_cap != 0) s = p_.soft_cap * tanh(s / p_.soft_cap);
      store<A>(scores(v + i, key), s);
    }
  }

  // Calls body(position, logical key) for the ancestors beyond the prefix that the query sees in this chunk, in order.
  template <typename Body>
  void for_ancestors(const Span& s, Body body) const {
    int64_t position = s.base;
    for (uint64_t bits = s.bits; bits != 0 && position < to_; bits &= bits - 1, ++position) {
      const int64_t key = s.base + __builtin_ctzll(bits);
      if (position >= s.visible && position >= s.low && position >= from_ && key >= p_.first_key) body(position, key);
    }
  }

  // Turns scores by logical key into weights by position (not yet divided by their sum).
  void softmax(int64_t v, const Partial<A>& to) {
    const Span& s = span(v);
    const A none = -std::numeric_limits<A>::infinity();
    A* at = scores(v, 0);
    const int64_t low = std::max(s.low, from_), begin = low / kLanes * kLanes;
    const int64_t end = std::min(ceil_div(s.end, kLanes) * kLanes, to_);
    to.tops[v] = none;
    to.sums[v] = 0;
    if (begin >= end) return;
    // a key's position is never above its logical index, so moving in order overwrites nothing that is still needed
    int64_t filled = std::clamp(s.visible, begin, end);
    for_ancestors(s, [&](int64_t position, int64_t key) {
      const A score = at[key];
      for (; filled < position; ++filled) at[filled] = none;
      at[position] = score;
      filled = position + 1;
    });
    for (; filled < end; ++filled) at[filled] = none;
    for (int64_t k = begin; k < low; ++k) at[k] = none;

    V most = splat<V>(none);
    for (int64_t k = begin; k < end; k += kLanes) {
      const V lanes = load<A>(at + k);
      most = lanes > most ? lanes : most;
    }
    const A top = largest<A>(most);
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
    to.tops[v] = top;
    to.sums[v] = sum<A>(total);
  }

  // out[v] = the values that vector v sees, weighted, added in the order of positions.
  void weigh(const Partial<A>& to) {
    out_ = to.out;
    std::fill(out_, out_ + vectors_ * out_width_, A{0});
    int64_t end = 0;
    for (int64_t q = 0; q < queries_; ++q) end = std::max(end, spans_[q].visible);
    end = std::min(end, to_);
    for (int64_t begin = origin_; begin < end; begin += kValueBlock)
      for (int64_t v = 0; v < vectors_;) {
        const int64_t left = vectors_ - v, step = left >= 4 ? 4 : left >= 2 ? 2 : 1;
        weigh_some(v, step, begin, std::min(begin + kValueBlock, to_));
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
    for_ancestors(span(v), [&](int64_t position, int64_t key) {
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

  void finish(const Partial<A>& merged) {
    for (int64_t v = 0; v < vectors_; ++v) {
      const int64_t head = task_.kv_head * p_.group + v % p_.group;
      T* to = p_.out + ((task_.first + v / p_.group) * p_.heads + head) * p_.value_dim;
      A scale = 0;  // of what has seen nothing
      if (!merged.empty(v)) {
        scale = 1 / merged.sums[v];
        if (p_.sinks) scale = beside_sink(merged.tops[v], merged.sums[v], p_.sinks[head]);
      }
      for (int64_t d = 0; d < p_.value_dim; d += kLanes)
        store_upto<T>(to + d, load<A>(merged.out + v * out_width_ + d) * scale, p_.value_dim - d);
    }
  }

  // What weights exp(score - top) of that sum are to be multiplied by where a sink takes its share.
  static A beside_sink(A top, A sum, A sink) {
    const A highest = std::max(top, sink), scale = exp(splat<V>(top - highest))[0];
    return scale / (sum * scale + exp(splat<V>(sink - highest))[0]);
  }

  const Problem<T>& p_;
  const AttentionTask& task_;
  const int64_t queries_, vectors_, out_width_, key_width_;
  const Span* spans_ = nullptr;
  const typename K::Item* loaded_ = nullptr;  // the queries
  typename K::Item* tile_ = nullptr;
  A *scores_ = nullptr, *out_ = nullptr;
  const void** rows_ = nullptr;  // value row of each logical key from origin_ on, then 64 more for a query's ancestors
  int64_t low_ = std::numeric_limits<int64_t>::max(), reach_ = 0, end_ = 0;  // of all queries together
  int64_t origin_ = 0, stride_ = 0, from_ = 0, to_ = 0;                      // of the chunk
};

}  // namespace saccade
