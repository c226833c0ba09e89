// Paged tree attention: its tasks, and the operator. What a task does: attention_tile.h.
#include <algorithm>
#include <atomic>
#include <optional>
#include <vector>

#include "attention.h"
#include "attention_tile.h"
#include "tensors.h"

namespace saccade {
namespace {

constexpr int64_t kTileVectors = 64;      // query vectors of one task
constexpr int64_t kTasksPerThread = 4;    // with so many, threads are never idle for long
constexpr double kIdle = 1.1;             // of the busiest thread's work to the mean: above, chunks are shared
constexpr int64_t kWorthSharing = 30000;  // of AttentionPlan.cost

template <typename T>
using Problem = AttentionProblem<T>;

int64_t work(const AttentionTask& task) { return task.keys * (task.last - task.first); }

// Whether threads that take tasks in this order, the longest first, would wait for one of them.
bool is_uneven(const std::vector<AttentionTask>& tasks, int64_t threads) {
  if (static_cast<int64_t>(tasks.size()) >= kTasksPerThread * threads) return false;
  std::vector<int64_t> loads(threads, 0);
  int64_t total = 0;
  for (const AttentionTask& task : tasks) {
    *std::min_element(loads.begin(), loads.end()) += work(task);
    total += work(task);
  }
  return *std::max_element(loads.begin(), loads.end()) * threads > kIdle * total;
}

void sort_by_work(std::vector<AttentionTask>& tasks) {
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const AttentionTask& a, const AttentionTask& b) { return work(a) > work(b); });
}

// Makes the chunks of each task tasks of their own.
template <typename T>
void split_tasks(const Problem<T>& p, AttentionPlan& plan) {
  std::vector<AttentionTask> whole;
  whole.swap(plan.tasks);
  for (const AttentionTask& task : whole) {
    const int64_t chunks = ceil_div(task.keys, kChunk), vectors = (task.last - task.first) * p.group;
    if (chunks == 1) {
      plan.tasks.push_back(task);
      continue;
    }
    const int64_t size = Partial<acc_t<T>>::size(vectors, ceil_div(p.value_dim, kLanes) * kLanes);
    plan.splits.push_back(std::make_shared<SplitQueries>(chunks, chunks * size * sizeof(acc_t<T>) + 64));
    for (int64_t chunk = 0; chunk < chunks; ++chunk) {
      const int64_t keys = std::min(kChunk, task.keys - chunk * kChunk);
      plan.tasks.push_back({task.row, task.kv_head, task.first, task.last, keys, chunk, plan.splits.back().get()});
    }
  }
}

}  // namespace

template <typename T>
AttentionPlan plan_attention(const AttentionProblem<T>& p, int64_t rows) {
  AttentionPlan plan;
  const int64_t step = std::max<int64_t>(1, kTileVectors / p.group);
  for (int64_t row = 0; row < rows; ++row)
    for (int64_t first = p.row_starts[row]; first < p.row_starts[row + 1]; first += step) {
      const int64_t last = std::min<int64_t>(first + step, p.row_starts[row + 1]);
      int64_t end = 1;
      for (int64_t token = first; token < last; ++token) end = std::max(end, span_of(p, row, token).end);
      for (int64_t head = 0; head < p.kv_heads; ++head) plan.tasks.push_back({row, head, first, last, end});
      plan.cost += end * p.kv_heads * ((last - first) * p.group + 2) * (p.key_dim + p.value_dim) / 64;
    }
  const int64_t threads = at::get_num_threads();
  if (threads == 1 || plan.cost < kWorthSharing) return plan;
  sort_by_work(plan.tasks);
  if (is_uneven(plan.tasks, threads)) {
    split_tasks(p, plan);
    sort_by_work(plan.tasks);
  }
  return plan;
}

template <typename T>
void run_attention(const AttentionProblem<T>& p, const AttentionTask& task) {
  Tile<T>(p, task).run();
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
