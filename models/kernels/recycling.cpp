// Token Recycling's matrix: decoding/drafters/successors.py defines what is learned and what is grown.
//
// Compiled with -ffp-contract=off: counts must have the bits that the definition gives them, or trees would differ.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <algorithm>
#include <cmath>
#include <tuple>
#include <vector>

#include "host_trees.h"
#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int kClassBits = 3;  // an entry is id << kClassBits | class
constexpr int64_t kClasses = 1 << kClassBits;
constexpr int32_t kNothing = -1;

inline int64_t id_of(int32_t entry) { return entry >> kClassBits; }
inline int64_t class_of(int32_t entry) { return entry & (kClasses - 1); }

// One salt's rows: index [V], row + 1 of each token that was seen; rows [C, k] entries.
class Matrix {
 public:
  Matrix(const Tensor& index, const Tensor& rows, int64_t used = 0)
      : index_(index.mutable_data_ptr<int32_t>()),
        rows_(rows.mutable_data_ptr<int32_t>()),
        vocab_(index.numel()),
        room_(rows.size(0)),
        width_(rows.size(1)),
        used_(used) {
    TORCH_CHECK(index.is_contiguous() && rows.is_contiguous(), "a matrix must be contiguous");
  }

  // Calls body(rank, entry) for the successors of a token, likeliest first.
  template <typename Body>
  void each(int64_t token, Body body) const {
    const int64_t row = index_[checked(token)];
    if (row == 0) return;
    const int32_t* entries = rows_ + (row - 1) * width_;
    for (int64_t rank = 0; rank < width_ && entries[rank] != kNothing; ++rank) body(rank, entries[rank]);
  }

  // The row of a token, to be written to.
  int32_t* place(int64_t token) {
    int32_t& row = index_[checked(token)];
    if (row == 0) {
      TORCH_CHECK_INDEX(used_ < room_, "recycling_learn: no room for another token");
      row = static_cast<int32_t>(++used_);
    }
    return rows_ + (row - 1) * width_;
  }

  int64_t checked(int64_t token) const {
    TORCH_CHECK_INDEX(token >= 0 && token < vocab_, "token ", token, " of ", vocab_);
    return token;
  }

  int64_t width() const { return width_; }
  int64_t used() const { return used_; }

 private:
  int32_t *index_, *rows_;
  int64_t vocab_, room_, width_, used_;
};

std::vector<Matrix> matrices_of(at::TensorList index, at::TensorList rows, at::IntArrayRef used) {
  TORCH_CHECK_VALUE(index.size() == rows.size() && (used.empty() || used.size() == rows.size()), "two parts of each matrix");
  std::vector<Matrix> made;
  for (size_t i = 0; i < index.size(); ++i) made.emplace_back(index[i], rows[i], used.empty() ? 0 : used[i]);
  return made;
}

// counts [M, L, k, classes, 2]: how often an entry was right, and how often there was one.
struct Counts {
  double* cells;
  int64_t modes, levels, ranks;

  explicit Counts(const Tensor& counts)
      : cells(counts.mutable_data_ptr<double>()), modes(counts.size(0)), levels(counts.size(1)), ranks(counts.size(2)) {
    TORCH_CHECK(counts.dim() == 5 && counts.is_contiguous() && counts.size(3) == kClasses && counts.size(4) == 2,
                "counts must be [M, L, k, ", kClasses, ", 2]");
  }

  double* at(int64_t mode, int64_t level, int64_t rank, int64_t share) const {
    return cells + (((mode * levels + std::min(level, levels - 1)) * ranks + rank) * kClasses + share) * 2;
  }

  void check(at::IntArrayRef of_rows, const std::vector<Matrix>& matrices) const {
    for (const int64_t mode : of_rows) TORCH_CHECK_INDEX(mode >= 0 && mode < modes, "mode ", mode, " of ", modes);
    for (const Matrix& matrix : matrices) TORCH_CHECK_VALUE(matrix.width() == ranks, "a matrix has other ranks than the counts");
  }
};

void check_owners(at::IntArrayRef owner, const std::vector<Matrix>& matrices) {
  for (const int64_t place : owner)
    TORCH_CHECK_INDEX(place >= 0 && place < static_cast<int64_t>(matrices.size()), "matrix ", place, " of ", matrices.size());
}

// Which of the entries that stood there were the tokens that came.
void judge(const Matrix& matrix, const Counts& counts, int64_t mode, const int64_t* text, int64_t tokens, double fading) {
  for (int64_t level = 0; level + 1 < tokens; ++level)
    matrix.each(text[level], [&](int64_t rank, int32_t entry) {
      double* cell = counts.at(mode, level, rank, class_of(entry));
      cell[0] = cell[0] * fading + (id_of(entry) == text[level + 1] ? 1.0 : 0.0);
      cell[1] = cell[1] * fading + 1.0;
    });
}

void write(Matrix& matrix, int64_t token, const int64_t* ids, const float* logits, int64_t known,
           at::ArrayRef<double> edges) {
  int32_t* entries = matrix.place(token);
  double weights[64], total = 0.0;
  for (int64_t rank = 0; rank < known; ++rank) {
    weights[rank] = std::exp(static_cast<double>(logits[rank]) - static_cast<double>(logits[0]));
    total += weights[rank];
  }
  for (int64_t rank = 0; rank < matrix.width(); ++rank) {
    if (rank >= known) {
      entries[rank] = kNothing;
      continue;
    }
    const double share = weights[rank] / total;
    const auto passed = std::count_if(edges.begin(), edges.end(), [&](double edge) { return share >= edge; });
    entries[rank] = static_cast<int32_t>(matrix.checked(ids[rank]) << kClassBits | passed);
  }
}

}  // namespace

// Returns how many rows of each matrix are used then.
std::vector<int64_t> recycling_learn(at::TensorList index, at::TensorList rows, at::IntArrayRef used, const Tensor& counts,
                                     double fading, const at::ArrayRef<double> edges, at::IntArrayRef owner,
                                     at::IntArrayRef modes, at::TensorList texts, const Tensor& tokens, const Tensor& first,
                                     const Tensor& path, const Tensor& ids, const Tensor& logits) {
  std::vector<Matrix> matrices = matrices_of(index, rows, used);
  const Counts tally(counts);
  const Tensor paths = path.contiguous(), likeliest = ids.contiguous(), values = logits.contiguous();
  const int64_t count = owner.size(), nodes = tokens.numel(), deepest = paths.size(1), known = likeliest.size(1);
  TORCH_CHECK_VALUE(int64_t(modes.size()) == count && int64_t(texts.size()) == count && first.numel() == count &&
                        paths.size(0) == count,
                    "recycling_learn: owner, modes, texts, first and path must have an entry for each row");
  TORCH_CHECK_VALUE(likeliest.size(0) == nodes && values.sizes() == likeliest.sizes() && known >= 1 && known <= tally.ranks &&
                        known <= 64 && int64_t(edges.size()) == kClasses - 1,
                    "recycling_learn: expected ids and logits [W, up to ", tally.ranks, "]");
  check_owners(owner, matrices);
  tally.check(modes, matrices);
  const int64_t *token = index_data<int64_t>(tokens, "tokens"), *root = index_data<int64_t>(first, "first");
  const int64_t *column = paths.const_data_ptr<int64_t>(), *successors = likeliest.const_data_ptr<int64_t>();
  const float* value = values.const_data_ptr<float>();

  std::vector<int64_t> row_of(nodes, -1);
  std::vector<bool> on_text(nodes, false);
  for (int64_t row = 0; row < count; ++row) {
    const int64_t end = row + 1 < count ? root[row + 1] : nodes;
    TORCH_CHECK_INDEX(root[row] >= 0 && root[row] < end && end <= nodes, "recycling_learn: row ", row, " has no nodes");
    std::fill(row_of.begin() + root[row], row_of.begin() + end, row);
    on_text[root[row]] = true;
    int64_t accepted = 0;
    for (; accepted < deepest && column[row * deepest + accepted] >= 0; ++accepted) {
      const int64_t node = root[row] + column[row * deepest + accepted];
      TORCH_CHECK_INDEX(node < end, "recycling_learn: a path leads to node ", node, " of ", end);
      on_text[node] = true;
    }
    const int64_t length = std::min<int64_t>(texts[row].numel(), accepted + 2);
    judge(matrices[owner[row]], tally, modes[row], index_data<int64_t>(texts[row], "text"), length, fading);
  }
  for (const bool accepted : {false, true})  // of one token's nodes those on the text are written last, and stay
    for (int64_t node = 0; node < nodes; ++node)
      if (on_text[node] == accepted && row_of[node] >= 0)
        write(matrices[owner[row_of[node]]], token[node], successors + node * known, value + node * known, known, edges);
  std::vector<int64_t> grown;
  for (const Matrix& matrix : matrices) grown.push_back(matrix.used());
  return grown;
}

namespace {

struct Node {
  int64_t parent, token, level;
  double confidence;
};

struct Offer {
  double path;
  int64_t number;  // of the node among all that were offered

  // among equals, the one that was offered first
  bool operator<(const Offer& other) const {
    return path < other.path || (path == other.path && number > other.number);
  }
};

// What is used again from row to row, for its memory.
struct Offers {
  std::vector<Node> nodes;
  std::vector<Offer> heap;
};

// The nodes with the highest path probabilities, parents first.
void grow(const Matrix& matrix, const Counts& counts, int64_t mode, int64_t root, int64_t nodes, int64_t depth,
          Offers& offers, std::vector<Node>& made) {
  auto& [offered, heap] = offers;
  offered.clear();
  heap.clear();
  const auto offer = [&](int64_t token, int64_t column, int64_t level, double path) {
    matrix.each(token, [&](int64_t rank, int32_t entry) {
      const double* cell = counts.at(mode, level, rank, class_of(entry));
      const double chance = cell[0] / cell[1];
      heap.push_back({path * chance, static_cast<int64_t>(offered.size())});
      std::push_heap(heap.begin(), heap.end());
      offered.push_back({column, id_of(entry), level + 1, chance});
    });
  };
  if (nodes > 0 && depth > 0) offer(root, 0, 0, 1.0);
  while (!heap.empty() && int64_t(made.size()) < nodes) {
    std::pop_heap(heap.begin(), heap.end());
    const Offer best = heap.back();
    heap.pop_back();
    const Node node = offered[best.number];
    made.push_back(node);
    if (node.level < depth) offer(node.token, made.size(), node.level, best.path);
  }
}

}  // namespace

TreeArrays recycling_trees(at::TensorList index, at::TensorList rows, const Tensor& counts, at::IntArrayRef owner,
                           at::IntArrayRef modes, at::IntArrayRef roots, at::IntArrayRef max_nodes,
                           at::IntArrayRef max_depth, int64_t bit) {
  const std::vector<Matrix> matrices = matrices_of(index, rows, {});
  const Counts tally(counts);
  const int64_t count = owner.size();
  TORCH_CHECK_VALUE(modes.size() == owner.size() && roots.size() == owner.size() && max_nodes.size() == owner.size() &&
                        max_depth.size() == owner.size(),
                    "recycling_trees: modes, roots and limits must have an entry for each row");
  check_owners(owner, matrices);
  tally.check(modes, matrices);
  std::vector<std::vector<Node>> trees(count);
  Offers offers;
  for (int64_t row = 0; row < count; ++row)
    grow(matrices[owner[row]], tally, modes[row], roots[row], max_nodes[row], max_depth[row], offers, trees[row]);
  return tree_arrays(
      trees, [&](int64_t row) { return roots[row]; }, [&](const Node&) { return int64_t{1} << bit; });
}

// Both in one call, which costs more than what either does; the matrices are those of both.
std::tuple<Tensor, Tensor, Tensor, Tensor, std::vector<int64_t>> recycling_learn_and_grow(
    at::TensorList index, at::TensorList rows, at::IntArrayRef used, const Tensor& counts, double fading,
    const at::ArrayRef<double> edges, at::IntArrayRef owner, at::IntArrayRef modes, at::TensorList texts,
    const Tensor& tokens, const Tensor& first, const Tensor& path, const Tensor& ids, const Tensor& logits,
    at::IntArrayRef owner_of_tree, at::IntArrayRef mode_of_tree, at::IntArrayRef roots, at::IntArrayRef max_nodes,
    at::IntArrayRef max_depth, int64_t bit) {
  std::vector<int64_t> grown = recycling_learn(index, rows, used, counts, fading, edges, owner, modes, texts, tokens, first,
                                               path, ids, logits);
  const auto [token, parent, confidence, source] =
      recycling_trees(index, rows, counts, owner_of_tree, mode_of_tree, roots, max_nodes, max_depth, bit);
  return {token, parent, confidence, source, grown};
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "recycling_learn_and_grow(Tensor(a!)[] index, Tensor(b!)[] rows, int[] used, Tensor(c!) counts, float fading, "
      "float[] edges, int[] owner, int[] modes, Tensor[] texts, Tensor tokens, Tensor first, Tensor path, Tensor ids, "
      "Tensor logits, int[] owner_of_tree, int[] mode_of_tree, int[] roots, int[] max_nodes, int[] max_depth, int bit) "
      "-> (Tensor tokens_, Tensor parents, Tensor confidence, Tensor source, int[] grown)");
  m.def(
      "recycling_learn(Tensor(a!)[] index, Tensor(b!)[] rows, int[] used, Tensor(c!) counts, float fading, float[] edges, "
      "int[] owner, int[] modes, Tensor[] texts, Tensor tokens, Tensor first, Tensor path, Tensor ids, Tensor logits) "
      "-> int[]");
  m.def(
      "recycling_trees(Tensor[] index, Tensor[] rows, Tensor counts, int[] owner, int[] modes, int[] roots, "
      "int[] max_nodes, int[] max_depth, int bit) "
      "-> (Tensor tokens, Tensor parents, Tensor confidence, Tensor source)");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("recycling_learn_and_grow", &recycling_learn_and_grow);
  m.impl("recycling_learn", &recycling_learn);
  m.impl("recycling_trees", &recycling_trees);
}

}  // namespace saccade
