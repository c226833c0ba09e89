// Growing trees of candidates (decoding/drafters/expansion.py): what lies between two passes of a drafter's model, in
// one call where array operations would take some thirty. Expansion.grow_anywhere defines what comes out.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <numeric>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int64_t kPage = 16;  // PAGE_SIZE of models/batch.py
constexpr int64_t kNoParent = -1;

using Level = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
                         double, double>;

// The next beam and the batch of its pass.
//
// guesses, confidence [S * B, K]: children of the beam's nodes. columns, masks, chance, depth [S * B]: the beam.
// number [S]: the rows' numbers in the sampling table. first: column of the first guess in the tree of candidates.
// scratch: scratch nodes so far, the root left out. size: nodes of the next beam.
// positions [T], wanted [>= S], tree_base, page_table [>= S, P]: of the pass over the chains, the S rows first.
// Returns the next beam's (columns, masks, chance, number, depth) [S * size]; its nodes' parents in the old beam; (token
// ids, positions, slots, visible, row_of) [S * size], row_starts [S + 1] and wanted of its batch; of the path
// probabilities of all guesses the largest, and the sum over rows of each row's largest.
Level next_beam(const Tensor& guesses, const Tensor& confidence, const Tensor& columns, const Tensor& masks,
                const Tensor& chance, const Tensor& depth, const Tensor& number, int64_t first, int64_t scratch,
                int64_t size, const Tensor& positions, const Tensor& wanted, const Tensor& tree_base,
                const Tensor& page_table, int64_t last_position) {
  const int64_t rows = number.numel(), nodes = columns.numel(), wide = nodes / std::max<int64_t>(rows, 1), k = guesses.size(1);
  const int64_t candidates = wide * k, count = rows * size, pages = page_table.size(1);
  TORCH_CHECK(guesses.dim() == 2 && guesses.size(0) == nodes && confidence.sizes() == guesses.sizes() &&
                  masks.numel() == nodes && chance.numel() == nodes && depth.numel() == nodes && wide * rows == nodes && wanted.numel() >= rows &&
                  tree_base.numel() >= rows && page_table.size(0) >= rows && rows >= 1 && size >= 1 && size <= candidates,
              "next_beam: the beam, its guesses and its batch do not fit together");
  const Tensor out_columns = empty({count}, at::kLong), out_masks = empty({count}, at::kLong);
  const Tensor out_chance = empty({count}, at::kFloat), parents = empty({count}, at::kLong);
  const Tensor token_ids = empty({count}, at::kLong), out_positions = empty({count}, at::kLong);
  const Tensor slots = empty({count}, at::kLong), visible = empty({count}, at::kInt), row_of = empty({count}, at::kInt);
  const Tensor numbers = empty({count}, at::kLong), out_depth = empty({count}, at::kLong);
  const Tensor row_starts = empty({rows + 1}, at::kInt), out_wanted = empty({count}, at::kLong);


  const int64_t *guess = index_data<int64_t>(guesses, "guesses"), *mask = index_data<int64_t>(masks, "masks");
  const int64_t *position = index_data<int64_t>(positions, "positions"), *root = index_data<int64_t>(wanted, "wanted");
  const int64_t *of = index_data<int64_t>(number, "number");
  const int64_t level = nodes ? index_data<int64_t>(depth, "depth")[0] + 1 : 1;
  const float *likely = index_data<float>(confidence, "confidence"), *reached = index_data<float>(chance, "chance");
  const int32_t *base = index_data<int32_t>(tree_base, "tree_base"), *table = index_data<int32_t>(page_table, "page_table");
  int32_t* starts = row_starts.mutable_data_ptr<int32_t>();
  float best = 0;
  double total = 0;
  std::vector<float> probability(candidates);
  std::vector<int64_t> order(candidates);
  for (int64_t row = 0; row < rows; ++row) {
    TORCH_CHECK((base[row] + scratch + size) / kPage < pages, "next_beam: row ", row, " has no room");
    starts[row] = static_cast<int32_t>(row * size);
    for (int64_t i = 0; i < candidates; ++i) {
      const float chance = reached[row * wide + i / k] * likely[row * candidates + i];
      probability[i] = chance == chance ? chance : 0;  // NaN, of a broken model, has no place in an order
    }
    std::iota(order.begin(), order.end(), 0);
    std::partial_sort(order.begin(), order.begin() + size, order.end(), [&](int64_t a, int64_t b) {
      return probability[a] != probability[b] ? probability[a] > probability[b] : a < b;
    });
    best = std::max(best, probability[order[0]]);
    total += probability[order[0]];
    for (int64_t i = 0; i < size; ++i) {
      const int64_t pick = order[i], parent = row * wide + pick / k, at = row * size + i;
      const int64_t key = base[row] + 1 + scratch + i;  // the root is scratch node 0 and lies in the chain
      out_columns.mutable_data_ptr<int64_t>()[at] = first + pick;
      out_masks.mutable_data_ptr<int64_t>()[at] = mask[parent] | static_cast<int64_t>(uint64_t{1} << (1 + scratch + i));
      out_chance.mutable_data_ptr<float>()[at] = probability[pick];
      parents.mutable_data_ptr<int64_t>()[at] = parent;
      token_ids.mutable_data_ptr<int64_t>()[at] = guess[row * candidates + pick];
      out_positions.mutable_data_ptr<int64_t>()[at] = std::min(position[root[row]] + level, last_position);
      slots.mutable_data_ptr<int64_t>()[at] = table[row * pages + key / kPage] * kPage + key % kPage;
      visible.mutable_data_ptr<int32_t>()[at] = base[row] + 1;
      row_of.mutable_data_ptr<int32_t>()[at] = static_cast<int32_t>(row);
      numbers.mutable_data_ptr<int64_t>()[at] = of[row];
      out_depth.mutable_data_ptr<int64_t>()[at] = level;
      out_wanted.mutable_data_ptr<int64_t>()[at] = at;
    }
  }
  starts[rows] = static_cast<int32_t>(count);
  return {out_columns,   out_masks, out_chance, numbers, out_depth,  parents,    token_ids,
          out_positions, slots,     visible,    row_of,  row_starts, out_wanted, best, total};
}

// Trees [S, N] of the roots' tokens [S, 1] and of all levels' guesses, in their order: (tokens, parents, confidence,
// source). columns[l]: where the nodes stand [S * B_l] whose children are guesses[l] and confidence[l] [S * B_l, K].
std::tuple<Tensor, Tensor, Tensor, Tensor> join_levels(const Tensor& roots, at::TensorList columns, at::TensorList guesses,
                                                       at::TensorList confidence, int64_t source) {
  const int64_t rows = roots.size(0), levels = static_cast<int64_t>(columns.size());
  int64_t width = 1;
  for (const Tensor& level : guesses) width += rows ? level.numel() / rows : 0;
  const Tensor tokens = empty({rows, width}, at::kLong), parents = empty({rows, width}, at::kLong);
  const Tensor likely = empty({rows, width}, at::kFloat), sources = empty({rows, width}, at::kLong);
  int64_t *token = tokens.mutable_data_ptr<int64_t>(), *parent = parents.mutable_data_ptr<int64_t>();
  int64_t *from = sources.mutable_data_ptr<int64_t>();
  float* chance = likely.mutable_data_ptr<float>();
  const int64_t* root = index_data<int64_t>(roots, "roots");
  for (int64_t row = 0; row < rows; ++row) {
    token[row * width] = root[row];
    parent[row * width] = kNoParent;
    chance[row * width] = 1.0f;
    from[row * width] = 0;
  }
  int64_t first = 1;
  for (int64_t level = 0; level < levels; ++level) {
    const int64_t k = guesses[level].size(1), wide = rows ? columns[level].numel() / rows : 0, count = wide * k;
    const int64_t *guess = index_data<int64_t>(guesses[level], "guesses"), *column = index_data<int64_t>(columns[level], "columns");
    const float* likelihood = index_data<float>(confidence[level], "confidence");
    TORCH_CHECK(guesses[level].numel() == rows * count && confidence[level].numel() == rows * count,
                "join_levels: guesses and confidence must be [S * B, K]");
    for (int64_t row = 0; row < rows; ++row)
      for (int64_t i = 0; i < count; ++i) {
        const int64_t at = row * width + first + i;
        token[at] = guess[row * count + i];
        parent[at] = column[row * wide + i / k];
        chance[at] = likelihood[row * count + i];
        from[at] = source;
      }
    first += count;
  }
  return {tokens, parents, likely, sources};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "next_beam(Tensor guesses, Tensor confidence, Tensor columns, Tensor masks, Tensor chance, Tensor depth, "
      "Tensor number, int first, int scratch, int size, Tensor positions, Tensor wanted, Tensor tree_base, "
      "Tensor page_table, int last_position) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, "
      "Tensor, Tensor, Tensor, Tensor, float, float)");
  m.def(
      "join_levels(Tensor roots, Tensor[] columns, Tensor[] guesses, Tensor[] confidence, int source) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("next_beam", &next_beam);
  m.impl("join_levels", &join_levels);
}

}  // namespace saccade
