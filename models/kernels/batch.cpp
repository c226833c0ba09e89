// A ragged batch from chains and trees: decoding/batcher.py's arithmetic in one pass, where each array op would cost
// more than the whole loop.
#include <torch/library.h>

#include <bit>
#include <tuple>

#include "tensors.h"

namespace saccade {
namespace {

constexpr int64_t kPage = 16;  // PAGE_SIZE of models/batch.py

using Batch = std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor,
                         at::Tensor, at::Tensor, int64_t, int64_t, at::Tensor, at::Tensor, at::Tensor, at::Tensor>;

// chain_tokens: the chains' tokens, row after row. starts, lengths [R]: cached tokens before each chain, its length.
// counts [S]: nodes of the trees that hang on the first S chains, root included.
// pages: the rows' pages, row after row; owned [R]: how many each row has.
// tokens, masks [S, N]: the trees, padding on the right; column 0 is the chain's last token. shift: of all positions.
// Returns the fields of RaggedBatch, then those of Nodes, in their order.
Batch build_batch(const at::Tensor& chain_tokens, at::IntArrayRef starts, at::IntArrayRef lengths, at::IntArrayRef counts,
                  at::IntArrayRef pages, at::IntArrayRef owned, const at::Tensor& tokens, const at::Tensor& masks,
                  int64_t shift) {
  const int64_t rows = static_cast<int64_t>(starts.size()), trees = static_cast<int64_t>(counts.size());
  TORCH_CHECK(static_cast<int64_t>(lengths.size()) == rows && trees <= rows && static_cast<int64_t>(owned.size()) == rows,
              "build_batch: starts, lengths and owned must have one entry a row");
  int64_t total = 0, nodes = 0, widest = 0, held = 0, fed = 0;
  for (int64_t r = 0; r < rows; ++r) {
    widest = std::max(widest, owned[r]);
    held += owned[r];
    fed += lengths[r];
  }
  TORCH_CHECK(held == static_cast<int64_t>(pages.size()) && fed == chain_tokens.numel(),
              "build_batch: owned and lengths must add up to the pages and tokens given");
  for (int64_t r = 0; r < rows; ++r) total += lengths[r] + (r < trees ? counts[r] - 1 : 0);
  for (int64_t r = 0; r < trees; ++r) nodes += counts[r];
  at::Tensor token_ids = empty({total}, at::kLong), positions = empty({total}, at::kLong), slots = empty({total}, at::kLong);
  at::Tensor visible = empty({total}, at::kInt), tree_mask = empty({total}, at::kLong), row_of = empty({total}, at::kInt);
  at::Tensor row_starts = empty({rows + 1}, at::kInt), tree_base = empty({rows}, at::kInt);
  // where every query token is a root, as in plain decoding, three of the arrays are one, and two others are
  const bool plain = total == nodes && nodes == trees;
  at::Tensor wanted = empty({nodes}, at::kLong), column = empty({nodes}, at::kLong);
  at::Tensor node_row = plain ? wanted : empty({nodes}, at::kLong), depth = plain ? column : empty({nodes}, at::kLong);
  at::Tensor first = plain ? wanted : empty({trees}, at::kLong);

  at::Tensor page_table = empty({rows, widest}, at::kInt);

  int32_t* table = page_table.mutable_data_ptr<int32_t>();
  const int64_t *page = pages.data(), *chain = index_data<int64_t>(chain_tokens, "tokens");
  const int64_t *tree_tokens = tokens.const_data_ptr<int64_t>(), *tree_masks = masks.const_data_ptr<int64_t>();
  int64_t *token = token_ids.mutable_data_ptr<int64_t>(), *position = positions.mutable_data_ptr<int64_t>();
  int64_t *slot = slots.mutable_data_ptr<int64_t>(), *mask = tree_mask.mutable_data_ptr<int64_t>();
  int64_t *want = wanted.mutable_data_ptr<int64_t>(), *of = node_row.mutable_data_ptr<int64_t>();
  int64_t *at_column = column.mutable_data_ptr<int64_t>(), *deep = depth.mutable_data_ptr<int64_t>();
  int32_t *seen = visible.mutable_data_ptr<int32_t>(), *row = row_of.mutable_data_ptr<int32_t>();
  int32_t *begin = row_starts.mutable_data_ptr<int32_t>(), *base = tree_base.mutable_data_ptr<int32_t>();
  int64_t q = 0, w = 0, longest = 0, keys = 0;
  for (int64_t r = 0; r < rows; ++r) {
    const int64_t end = starts[r] + lengths[r], count = r < trees ? counts[r] : 1, query = lengths[r] + count - 1;
    TORCH_CHECK(lengths[r] > 0 && count > 0 && end + count - 1 <= owned[r] * kPage, "build_batch: row ", r, " has no room");
    int32_t* own = table + r * widest;
    std::fill(std::copy_n(page, owned[r], own), own + widest, 0);
    page += owned[r];
    begin[r] = static_cast<int32_t>(q);
    base[r] = static_cast<int32_t>(end - 1);
    longest = std::max(longest, query);
    keys = std::max(keys, end + count - 1);
    if (r < trees) first.mutable_data_ptr<int64_t>()[r] = w;
    for (int64_t i = 0; i < query; ++i, ++q) {
      const int64_t index = starts[r] + i, node = i - lengths[r] + 1;  // node: column in the tree, 0 at the root
      row[q] = static_cast<int32_t>(r);
      slot[q] = own[index / kPage] * kPage + index % kPage;
      seen[q] = static_cast<int32_t>(std::min(index + 1, end));
      token[q] = node <= 0 ? *chain++ : tree_tokens[r * tokens.stride(0) + node * tokens.stride(1)];
      position[q] = index + shift;
      mask[q] = 0;
      if (node < 0 || r >= trees) continue;
      mask[q] = tree_masks[r * masks.stride(0) + node * masks.stride(1)];
      deep[w] = std::popcount(static_cast<uint64_t>(mask[q])) - 1;
      position[q] = end - 1 + deep[w] + shift;
      want[w] = q;
      of[w] = r;
      at_column[w++] = node;
    }
  }
  begin[rows] = static_cast<int32_t>(q);
  return {token_ids,  positions, slots,   visible, tree_mask, row_of, row_starts, tree_base,
          page_table, wanted,    longest, keys,    node_row,  column, depth,      first};
}

}  // namespace

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "build_batch(Tensor chain_tokens, int[] starts, int[] lengths, int[] counts, int[] pages, int[] owned, Tensor tokens, "
      "Tensor masks, int shift) -> (Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, int, int, Tensor, "
      "Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) { m.impl("build_batch", &build_batch); }

}  // namespace saccade
