// The bookkeeping of token trees on the host (models/tree_ops.py). The functions of models/tree.py define what comes
// out, bit for bit: sums run in column order, products along paths double their reach, as there.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int64_t kNoParent = -1;
constexpr int64_t kPins = 32, kGuessed = (int64_t(1) << kPins) - 1;  // bits of a source: see Trees in models/tree.py
constexpr int64_t kMaxTree = 64;
constexpr float kCertain = 1.0f - 1.0f / 65536;  // models/tree.py says why
constexpr double kImpossible = 1e-30;

int64_t bit(int64_t column) { return static_cast<int64_t>(uint64_t(1) << column); }

// Trees [R, N] of one drafter.
struct Proposal {
  Tensor tokens, parents, confidence, source;

  int64_t width() const { return tokens.size(1); }
};

struct Node {
  int64_t token, parent, source;
  float confidence;
  int64_t first_child = -1, next_sibling = -1;  // chains of the nodes met so far
};

// One row's result, padding excluded.
struct Chosen {
  int64_t count = 1, deepest = 0;
  int64_t tokens[kMaxTree], parents[kMaxTree], source[kMaxTree], masks[kMaxTree];
  float confidence[kMaxTree];
};

Proposal checked(const Tensor& tokens, const Tensor& parents, const Tensor& confidence, const Tensor& source) {
  TORCH_CHECK_VALUE(tokens.dim() == 2 && tokens.size(1) >= 1, "trees must be [R, N] with a root");
  for (const Tensor* other : {&parents, &confidence, &source})
    TORCH_CHECK_VALUE(other->sizes() == tokens.sizes(), "the arrays of trees must have one shape");
  return {tokens.contiguous(), parents.contiguous(), confidence.contiguous(), source.contiguous()};
}

// The row's nodes, those of the same parent and token as one, in the order in which each was met first.
std::vector<Node> merged(const std::vector<Proposal>& proposals, int64_t row) {
  const Proposal& any = proposals.front();
  const int64_t root = row * any.width();
  std::vector<Node> nodes{{any.tokens.const_data_ptr<int64_t>()[root], kNoParent,
                           any.source.const_data_ptr<int64_t>()[root], any.confidence.const_data_ptr<float>()[root]}};
  std::vector<int64_t> place;  // of a proposal's columns among the nodes
  for (const Proposal& proposal : proposals) {
    const int64_t width = proposal.width(), first = row * width;
    const int64_t* tokens = proposal.tokens.const_data_ptr<int64_t>() + first;
    const int64_t* parents = proposal.parents.const_data_ptr<int64_t>() + first;
    const int64_t* source = proposal.source.const_data_ptr<int64_t>() + first;
    const float* confidence = proposal.confidence.const_data_ptr<float>() + first;
    place.assign(width, -1);
    place[0] = 0;
    for (int64_t column = 1; column < width; ++column) {
      if (parents[column] == kNoParent) continue;
      TORCH_CHECK_VALUE(parents[column] >= 0 && parents[column] < column, "a parent must stand before its children");
      const int64_t parent = place[parents[column]];
      if (parent < 0) continue;  // hangs on padding: out of reach
      int64_t same = nodes[parent].first_child;
      while (same >= 0 && nodes[same].token != tokens[column]) same = nodes[same].next_sibling;
      if (same >= 0) {
        nodes[same].confidence = std::max(nodes[same].confidence, confidence[column]);
        nodes[same].source |= source[column];
      } else {
        same = nodes.size();
        nodes.push_back({tokens[column], parent, source[column], confidence[column], -1, nodes[parent].first_child});
        nodes[parent].first_child = same;
      }
      place[column] = same;
    }
  }
  return nodes;
}

// Probability of each node's path (path_confidence of models/tree.py).
std::vector<float> path_probabilities(const std::vector<Node>& nodes) {
  const int64_t count = nodes.size();
  std::vector<float> sums(count, 0.0f), probability(count);
  std::vector<int64_t> pointer(count, 0);
  for (int64_t i = 1; i < count; ++i) sums[nodes[i].parent] += nodes[i].confidence;
  probability[0] = nodes[0].confidence;
  for (int64_t i = 1; i < count; ++i) {
    pointer[i] = nodes[i].parent;
    probability[i] = std::min(nodes[i].confidence / std::max(sums[pointer[i]], 1.0f), kCertain);
  }
  for (bool reached = false; !reached;) {
    reached = true;
    for (int64_t i = count - 1; i > 0; --i) {  // downwards: what stands before i is still of the last round
      probability[i] *= probability[pointer[i]];
      pointer[i] = pointer[pointer[i]];
      reached &= pointer[i] == 0;
    }
  }
  return probability;
}

// A row's merged nodes, and those that may be kept: within the row's own limits, in tree order.
struct Candidates {
  std::vector<Node> nodes;
  std::vector<float> probability;
  std::vector<int64_t> depth, kept;
  int64_t pins = 0;  // nodes that are bought whatever they promise: all pinned ones, or none where they do not fit

  bool pinned(int64_t i) const { return pins > 0 && nodes[i].source >> kPins; }

  // Keeps the `count` best: pinned ones, then the most probable; of equals those that stand first.
  void keep_best(int64_t count) {
    if (static_cast<int64_t>(kept.size()) <= count) return;
    const auto merit = [&](int64_t i) { return pinned(i) ? 2.0f : probability[i]; };
    std::nth_element(kept.begin(), kept.begin() + count, kept.end(), [&](int64_t a, int64_t b) {
      const float first = merit(a), second = merit(b);
      return first != second ? first > second : a < b;
    });
    kept.resize(count);
    std::sort(kept.begin(), kept.end());
  }
};

Candidates candidates_of(const std::vector<Proposal>& proposals, int64_t row, int64_t max_nodes, int64_t max_depth,
                         float lowest, int64_t spared) {
  Candidates row_of{merged(proposals, row), {}, {}, {}};
  const std::vector<Node>& nodes = row_of.nodes;
  const int64_t count = nodes.size();
  row_of.probability = path_probabilities(nodes);
  row_of.depth.assign(count, 0);
  int64_t pins = 0;
  bool shallow = true;
  for (int64_t i = 1; i < count; ++i) {
    row_of.depth[i] = row_of.depth[nodes[i].parent] + 1;
    if (!(nodes[i].source >> kPins)) continue;
    ++pins;
    shallow &= row_of.depth[i] <= max_depth;
  }
  if (shallow && pins <= max_nodes) row_of.pins = pins;
  for (int64_t i = 1; i < count; ++i) {
    if (row_of.pinned(i)) {
      row_of.kept.push_back(i);
      continue;
    }
    if (nodes[i].source >> kPins && !(nodes[i].source & kGuessed)) continue;  // nobody takes it for right
    const float floor = nodes[i].source & spared ? kImpossible : lowest;
    if (row_of.depth[i] <= max_depth && row_of.probability[i] >= floor) row_of.kept.push_back(i);
  }
  row_of.keep_best(max_nodes);
  return row_of;
}

// How many nodes of each row are worth their price: the pinned ones, and of the others the k most probable of all rows
// together, for the k with the most expected tokens a second, (rows + probabilities of all that is bought) / price.
void buy(std::vector<Candidates>& rows, const Tensor& price) {
  const double* seconds = price.const_data_ptr<double>();
  std::vector<std::pair<float, int64_t>> offers;  // probability, row
  std::vector<int64_t> count(rows.size(), 0);
  size_t pins = 0;
  double gained = 0;
  for (size_t row = 0; row < rows.size(); ++row)
    for (const int64_t i : rows[row].kept) {
      if (!rows[row].pinned(i)) {
        offers.emplace_back(rows[row].probability[i], row);
        continue;
      }
      gained += rows[row].probability[i];
      ++count[row];
      ++pins;
    }
  TORCH_CHECK_VALUE(price.numel() > static_cast<int64_t>(pins + offers.size()), "a price is missing: ",
                    pins + offers.size(), " nodes are offered");
  std::stable_sort(offers.begin(), offers.end(), [](const auto& a, const auto& b) { return a.first > b.first; });
  const double roots = rows.size();
  double best = (roots + gained) / seconds[pins];
  size_t bought = 0;
  for (size_t k = 0; k < offers.size(); ++k) {
    gained += offers[k].first;
    const double rate = (roots + gained) / seconds[pins + k + 1];
    if (rate <= best) continue;
    best = rate;
    bought = k + 1;
  }
  for (size_t k = 0; k < bought; ++k) ++count[offers[k].second];
  for (size_t row = 0; row < rows.size(); ++row) rows[row].keep_best(count[row]);
}

Chosen built(const Candidates& row) {
  const std::vector<Node>& nodes = row.nodes;
  std::vector<int64_t> column(nodes.size(), 0);
  Chosen chosen;
  chosen.tokens[0] = nodes[0].token;
  chosen.parents[0] = kNoParent;
  chosen.confidence[0] = nodes[0].confidence;
  chosen.source[0] = nodes[0].source;
  chosen.masks[0] = 1;
  for (const int64_t i : row.kept) {  // a parent is pinned or more probable than its child: kept, and stands before it
    const int64_t at = chosen.count++, parent = column[nodes[i].parent];
    column[i] = at;
    chosen.tokens[at] = nodes[i].token;
    chosen.parents[at] = parent;
    chosen.confidence[at] = nodes[i].confidence;
    chosen.source[at] = nodes[i].source;
    chosen.masks[at] = chosen.masks[parent] | bit(at);
    chosen.deepest = std::max(chosen.deepest, row.depth[i]);
  }
  return chosen;
}

template <typename T>
void fill(const Tensor& out, int64_t row, const T* values, int64_t count, T padding) {
  T* to = out.mutable_data_ptr<T>() + row * out.size(1);
  std::copy_n(values, count, to);
  std::fill(to + count, to + out.size(1), padding);
}

using Packed = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, std::vector<int64_t>, int64_t>;

// (tokens, parents, confidence, source, masks) [R, N] with padding on the right; counts; deepest.
Packed packed(const std::vector<Chosen>& chosen) {
  const int64_t rows = chosen.size();
  std::vector<int64_t> counts;
  int64_t width = 1, deepest = 0;
  for (const Chosen& row : chosen) {
    counts.push_back(row.count);
    width = std::max(width, row.count);
    deepest = std::max(deepest, row.deepest);
  }
  const Tensor tokens = empty({rows, width}, at::kLong), parents = empty({rows, width}, at::kLong);
  const Tensor confidence = empty({rows, width}, at::kFloat), source = empty({rows, width}, at::kLong);
  const Tensor masks = empty({rows, width}, at::kLong);
  for (int64_t row = 0; row < rows; ++row) {
    const Chosen& kept = chosen[row];
    fill(tokens, row, kept.tokens, kept.count, int64_t(-1));
    fill(parents, row, kept.parents, kept.count, kNoParent);
    fill(confidence, row, kept.confidence, kept.count, 0.0f);
    fill(source, row, kept.source, kept.count, int64_t(0));
    fill(masks, row, kept.masks, kept.count, int64_t(1));
    // ancestor_masks lets padding hang on the root
    for (int64_t i = kept.count; i < width; ++i) masks.mutable_data_ptr<int64_t>()[row * width + i] |= bit(i);
  }
  return {tokens, parents, confidence, source, masks, std::move(counts), deepest};
}

}  // namespace

Packed choose_nodes(at::TensorList tokens, at::TensorList parents, at::TensorList confidence, at::TensorList source,
                    at::IntArrayRef max_nodes, at::IntArrayRef max_depth, double min_probability, int64_t spared,
                    const std::optional<Tensor>& price) {
  TORCH_CHECK_VALUE(!tokens.empty(), "there must be a proposal");
  const int64_t rows = tokens[0].size(0);
  std::vector<Proposal> proposals;
  int64_t columns = 0;
  for (size_t i = 0; i < tokens.size(); ++i) {
    proposals.push_back(checked(tokens[i], parents[i], confidence[i], source[i]));
    TORCH_CHECK_VALUE(tokens[i].size(0) == rows, "proposals must have the same rows");
    columns += tokens[i].size(1);
  }
  TORCH_CHECK_VALUE(int64_t(max_nodes.size()) == rows && int64_t(max_depth.size()) == rows, "a limit for each row");
  for (const int64_t limit : max_nodes)
    TORCH_CHECK_VALUE(limit >= 0 && limit < kMaxTree, "a tree has at most ", kMaxTree, " nodes, root included, not ",
                      limit + 1);
  const float lowest = std::max(min_probability, kImpossible);
  std::vector<Candidates> offered(rows);
  std::vector<Chosen> chosen(rows);
  parallel_tasks(rows, rows * columns * 20, [&](int64_t row) {
    offered[row] = candidates_of(proposals, row, max_nodes[row], max_depth[row], lowest, spared);
  });
  if (price) {
    TORCH_CHECK_VALUE(price->scalar_type() == at::kDouble && price->is_contiguous(), "prices must be dense float64");
    buy(offered, *price);
  }
  for (int64_t row = 0; row < rows; ++row) chosen[row] = built(offered[row]);
  return packed(chosen);
}

std::tuple<Tensor, Tensor, Tensor, Tensor> walk_trees(const Tensor& tokens, const Tensor& parents, const Tensor& drawn,
                                                      const Tensor& first, int64_t deepest) {
  TORCH_CHECK_VALUE(tokens.dim() == 2 && parents.sizes() == tokens.sizes() && first.dim() == 1 &&
                        first.size(0) == tokens.size(0) && drawn.dim() == 1 && deepest >= 0,
                    "expected trees [S, N], drawn [W], first [S]");
  const int64_t rows = tokens.size(0), width = tokens.size(1), nodes = drawn.size(0);
  const Tensor dense_tokens = tokens.contiguous(), dense_parents = parents.contiguous();
  const Tensor accepted = empty({rows}, at::kLong), path = empty({rows, deepest}, at::kLong);
  const Tensor bonus = empty({rows}, at::kLong), text = empty({rows, deepest + 1}, at::kLong);
  const int64_t* draws = index_data<int64_t>(drawn, "drawn");
  const int64_t* starts = index_data<int64_t>(first, "first");
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* token = dense_tokens.const_data_ptr<int64_t>() + row * width;
    const int64_t* parent = dense_parents.const_data_ptr<int64_t>() + row * width;
    int64_t* on_path = path.mutable_data_ptr<int64_t>() + row * deepest;
    int64_t* said = text.mutable_data_ptr<int64_t>() + row * (deepest + 1);
    int64_t node = 0, depth = 0;
    const auto draw = [&] {
      TORCH_CHECK_INDEX(starts[row] >= 0 && starts[row] + node < nodes, "node ", starts[row] + node, " of ", nodes);
      return draws[starts[row] + node];
    };
    int64_t next = draw();
    for (int64_t column = 1; column < width; ++column) {  // children stand behind their parent: one pass finds all
      if (parent[column] != node || token[column] != next) continue;
      TORCH_CHECK_VALUE(depth < deepest, "a node is deeper than ", deepest);
      on_path[depth] = column;
      said[depth++] = next;
      node = column;
      next = draw();
    }
    said[depth] = next;
    std::fill(on_path + depth, on_path + deepest, -1);
    std::fill(said + depth + 1, said + deepest + 1, -1);
    accepted.mutable_data_ptr<int64_t>()[row] = depth;
    bonus.mutable_data_ptr<int64_t>()[row] = next;
  }
  return {accepted, path, bonus, text};
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "choose_nodes(Tensor[] tokens, Tensor[] parents, Tensor[] confidence, Tensor[] source, int[] max_nodes, "
      "int[] max_depth, float min_probability, int spared=0, Tensor? price=None) -> (Tensor, Tensor, Tensor, Tensor, Tensor, int[], int)");
  m.def(
      "walk_trees(Tensor tokens, Tensor parents, Tensor drawn, Tensor first, int deepest) "
      "-> (Tensor, Tensor, Tensor, Tensor)");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("choose_nodes", &choose_nodes);
  m.impl("walk_trees", &walk_trees);
}

}  // namespace saccade
