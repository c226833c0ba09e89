// Paged tree attention, cut into tasks that threads may run in any order (attention.cpp).
#pragma once

#include <cstdint>
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

// Query tokens [first, last) of a row with one key/value head.
struct AttentionTask {
  int64_t row, kv_head, first, last;
};

struct AttentionPlan {
  std::vector<AttentionTask> tasks;
  int64_t cost;  // of all of them, in the units of parallel_tasks
};

// The tasks of R rows. They are the same for every layer of a forward pass whose heads are the same.
template <typename T>
AttentionPlan plan_attention(const AttentionProblem<T>& problem, int64_t rows);

template <typename T>
void run_attention(const AttentionProblem<T>& problem, const AttentionTask& task);

}  // namespace saccade
