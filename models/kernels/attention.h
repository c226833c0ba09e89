// Paged tree attention, cut into tasks that threads may run in any order (attention.cpp).
#pragma once

#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

#include "vec.h"

namespace saccade {

// One layer's attention over a ragged batch (models/batch.py). Strides are in elements.
template <typename T>
struct AttentionProblem {
  using A = acc_t<T>;
  const T *query, *keys, *values;
  T* out;
  const A* sinks;  // [Hq] or null
  const int32_t *visible, *row_starts, *tree_base, *page_table;
  const int64_t *tree_mask, *positions;
  int64_t query_token, query_head, key_slot, key_head, value_slot, value_head, pages;  // strides
  int64_t heads, kv_heads, group, key_dim, value_dim;
  A scale, soft_cap;           // soft_cap 0: none
  int64_t window, first_key;  // window 0: none

  // ids and slots of a row's logical keys
  int64_t slot(int64_t row, int64_t key) const {
    return int64_t{page_table[row * pages + key / kLanes]} * kLanes + key % kLanes;
  }
};

// Keys are taken in chunks of this many positions, each with a softmax of its own, and chunks are added in their order.
// So results do not depend on which tasks, if any, share a long context.
constexpr int64_t kChunk = 512;

// Query tokens whose chunks are tasks of their own: where the chunks' results lie until the last of them is there.
struct SplitQueries {
  int64_t chunks;
  std::atomic<int64_t> open;  // chunks that are not done
  std::unique_ptr<char[]> results;  // of all chunks, aligned by whoever uses it

  SplitQueries(int64_t count, int64_t bytes) : chunks(count), open(count), results(new char[bytes]) {}
};

// Query tokens [first, last) of a row with one key/value head: all their keys, or one chunk of them.
struct AttentionTask {
  int64_t row, kv_head, first, last;
  int64_t keys;  // how many there are, at most
  int64_t chunk = 0;
  SplitQueries* split = nullptr;  // null: all keys
};

struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  int64_t cost = 0;  // of all of them, in the units of parallel_tasks
  std::vector<std::shared_ptr<SplitQueries>> splits;
};

// The tasks of R rows, the longest first where threads share them. They are the same for every layer of a forward pass whose heads are the same,
// and may be run again when all are done.
template <typename T>
AttentionPlan plan_attention(const AttentionProblem<T>& problem, int64_t rows);

template <typename T>
void run_attention(const AttentionProblem<T>& problem, const AttentionTask& task);

}  // namespace saccade
