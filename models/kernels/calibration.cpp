// What drafters' confidences are worth (decoding/calibration.py): mapping them through the learned curves, and holding
// proposals against the text that came. The functions of decoding/proposal_ops.py define what comes out.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <cmath>
#include <tuple>
#include <vector>

#include "tensors.h"

namespace saccade {
namespace {

using at::Tensor;

constexpr int64_t kNoParent = -1;
constexpr double kImpossible = 1e-30;
constexpr double kFirstKnot = -6, kLeast = 1e-3;  // decoding/proposal_ops.py

// Where a confidence lies among the knots of a curve: between `below` and the next one.
struct Place {
  int64_t below;
  double share;  // of the knot above

  Place(float confidence, int64_t knots) {
    const double c = std::min(std::max<double>(confidence, 1e-9), 1 - 1e-7);
    const double at = std::min(std::max(std::log(c / (1 - c)) - kFirstKnot, 0.0), static_cast<double>(knots - 1));
    below = std::min(static_cast<int64_t>(at), knots - 2);
    share = at - below;
  }
};

void check_trees(const Tensor& parents, const Tensor& confidence, const Tensor& mode, const Tensor& curves) {
  TORCH_CHECK_VALUE(parents.dim() == 2 && confidence.sizes() == parents.sizes() && mode.numel() == parents.size(0) &&
                        curves.dim() == 3 && curves.size(2) >= 2 && curves.is_contiguous(),
                    "expected trees [R, N], modes [R], curves [M, D, B]");
}

}  // namespace

Tensor recalibrate(const Tensor& parents, const Tensor& confidence, const Tensor& mode, const Tensor& curves) {
  check_trees(parents, confidence, mode, curves);
  const Tensor above = parents.contiguous(), given = confidence.contiguous();
  const int64_t rows = parents.size(0), width = parents.size(1), depths = curves.size(1), knots = curves.size(2);
  Tensor out = empty(parents.sizes(), at::kFloat);
  const int64_t* modes = index_data<int64_t>(mode, "mode");
  std::vector<int64_t> depth(width);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* parent = above.const_data_ptr<int64_t>() + row * width;
    const float* from = given.const_data_ptr<float>() + row * width;
    float* to = out.mutable_data_ptr<float>() + row * width;
    const double* curve = curves.const_data_ptr<double>() + modes[row] * depths * knots;
    for (int64_t i = 0; i < width; ++i) {
      depth[i] = parent[i] == kNoParent ? 0 : depth[parent[i]] + 1;
      to[i] = from[i];
      if (parent[i] == kNoParent || from[i] < kImpossible) continue;
      const Place place(from[i], knots);
      const double* knot = curve + std::min(depth[i] - 1, depths - 1) * knots + place.below;
      to[i] = static_cast<float>(knot[0] + place.share * (knot[1] - knot[0]));
    }
  }
  return out;
}

std::tuple<Tensor, Tensor, Tensor> score_proposals(const Tensor& tokens, const Tensor& parents, const Tensor& confidence,
                                                   const Tensor& calibrated, const Tensor& text, const Tensor& mode,
                                                   double floor, const Tensor& hits, const Tensor& trials,
                                                   const Tensor& surprise) {
  check_trees(parents, confidence, mode, hits);
  const int64_t rows = parents.size(0), width = parents.size(1), longest = text.size(1);
  const int64_t depths = hits.size(1), knots = hits.size(2);
  TORCH_CHECK_VALUE(tokens.sizes() == parents.sizes() && calibrated.sizes() == parents.sizes() && text.size(0) == rows &&
                        trials.sizes() == hits.sizes() && surprise.size(1) == depths && surprise.size(2) == 2,
                    "score_proposals: shapes do not fit together");
  const Tensor all_tokens = tokens.contiguous(), all_parents = parents.contiguous(), all_text = text.contiguous();
  const Tensor raw = confidence.contiguous(), mapped = calibrated.contiguous();
  const Tensor reach = empty({rows}, at::kLong), extent = empty({rows}, at::kLong);
  const Tensor widths = empty({rows, longest}, at::kLong);
  std::fill_n(widths.mutable_data_ptr<int64_t>(), rows * longest, 0);
  const int64_t* modes = index_data<int64_t>(mode, "mode");
  std::vector<int64_t> depth(width);
  std::vector<double> path(width);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* token = all_tokens.const_data_ptr<int64_t>() + row * width;
    const int64_t* parent = all_parents.const_data_ptr<int64_t>() + row * width;
    const int64_t* came = all_text.const_data_ptr<int64_t>() + row * longest;
    const float* given = raw.const_data_ptr<float>() + row * width;
    const float* worth = mapped.const_data_ptr<float>() + row * width;
    int64_t* wide = widths.mutable_data_ptr<int64_t>() + row * longest;
    int64_t deepest = 0, covered = 0, node = 0;
    for (int64_t i = 0; i < width; ++i) {
      const bool drafted = parent[i] != kNoParent;
      depth[i] = drafted ? depth[parent[i]] + 1 : 0;
      path[i] = drafted ? path[parent[i]] * worth[i] : 1.0;
      if (!drafted) continue;
      deepest = std::max(deepest, depth[i]);
      if (path[i] >= floor && depth[i] <= longest) ++wide[depth[i] - 1];
    }
    for (int64_t level = 0; level < longest && came[level] >= 0 && node >= 0; ++level) {
      const int64_t at = (modes[row] * depths + std::min(level, depths - 1)), base = at * knots;
      double mass = 0, expected = 0, seen = 0;
      bool any = false;
      int64_t next = -1;
      for (int64_t i = node + 1; i < width; ++i) {
        if (parent[i] != node || given[i] < kImpossible) continue;
        const bool right = token[i] == came[level];
        const Place place(given[i], knots);
        for (int64_t side = 0; side < 2; ++side) {
          const double share = side ? place.share : 1 - place.share;
          trials.mutable_data_ptr<double>()[base + place.below + side] += share;
          if (right) hits.mutable_data_ptr<double>()[base + place.below + side] += share;
        }
        any = true;
        mass += given[i];
        const double log = std::log(std::max<double>(given[i], kLeast));
        expected += given[i] * log;
        if (right) {
          seen = log;
          next = i;
        }
      }
      if (any) {
        const double rest = std::max(1 - mass, kLeast), log = std::log(rest);
        expected += rest * log;
        double* moment = surprise.mutable_data_ptr<double>() + at * 2;
        moment[0] += (next >= 0 ? seen : log) - expected / (mass + rest);
        moment[1] += 1;
      }
      node = next;
      if (node >= 0 && path[node] >= floor && covered == level) covered = level + 1;
    }
    reach.mutable_data_ptr<int64_t>()[row] = covered;
    extent.mutable_data_ptr<int64_t>()[row] = deepest;
  }
  return {reach, extent, widths};
}

std::tuple<Tensor, Tensor> proposal_coverage(const Tensor& parents, const Tensor& confidence, double floor, int64_t longest) {
  TORCH_CHECK_VALUE(parents.dim() == 2 && confidence.sizes() == parents.sizes(), "expected trees [R, N]");
  const Tensor above = parents.contiguous(), given = confidence.contiguous();
  const int64_t rows = parents.size(0), width = parents.size(1);
  const Tensor held = empty({rows, longest}, at::kDouble), nodes = empty({rows}, at::kLong);
  std::vector<int64_t> depth(width);
  std::vector<double> path(width);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* parent = above.const_data_ptr<int64_t>() + row * width;
    const float* sure = given.const_data_ptr<float>() + row * width;
    double* at = held.mutable_data_ptr<double>() + row * longest;
    int64_t count = 0;
    std::fill_n(at, longest, 0.0);
    for (int64_t i = 0; i < width; ++i) {
      const bool drafted = parent[i] != kNoParent;
      depth[i] = drafted ? depth[parent[i]] + 1 : 0;
      path[i] = drafted ? path[parent[i]] * sure[i] : 1.0;
      if (!drafted || path[i] < floor || depth[i] > longest) continue;
      at[depth[i] - 1] += path[i];
      ++count;
    }
    for (int64_t level = 0; level < longest; ++level) at[level] = std::min(at[level], 1.0);
    nodes.mutable_data_ptr<int64_t>()[row] = count;
  }
  return {held, nodes};
}

void learn_coverage(const Tensor& chances, const Tensor& common, const Tensor& widths, int64_t bit, const Tensor& slots,
                    const Tensor& modes, const Tensor& asked, const Tensor& reach, const Tensor& wide, double row_rate,
                    double all_rate) {
  const int64_t drafters = chances.size(1), depths = chances.size(2), rows = slots.numel();
  TORCH_CHECK_VALUE(common.size(1) == drafters && common.size(2) == depths && widths.size(1) == depths && bit < drafters &&
                        wide.size(0) == rows && wide.size(1) >= depths && chances.is_contiguous() &&
                        common.is_contiguous() && widths.is_contiguous(),
                    "learn_coverage: shapes do not fit together");
  const int64_t* slot = index_data<int64_t>(slots, "slots");
  const int64_t* mode = index_data<int64_t>(modes, "modes");
  const int64_t* known = index_data<int64_t>(asked, "asked");
  const int64_t* covered = index_data<int64_t>(reach, "reach");
  const int64_t* nodes = index_data<int64_t>(wide, "wide");
  for (int64_t row = 0; row < rows; ++row) {
    double* own = slot[row] < 0 ? nullptr : chances.mutable_data_ptr<double>() + (slot[row] * drafters + bit) * depths;
    double* all = common.mutable_data_ptr<double>() + (mode[row] * drafters + bit) * depths;
    double* spread = widths.mutable_data_ptr<double>() + bit * depths;
    for (int64_t level = 0; level < std::min(known[row], depths); ++level) {
      const double right = level < covered[row];
      if (own) own[level] += row_rate * (right - own[level]);
      all[level] += all_rate * (right - all[level]);
      spread[level] += all_rate * (nodes[row * wide.size(1) + level] - spread[level]);
      if (right == 0) break;
    }
  }
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def("recalibrate(Tensor parents, Tensor confidence, Tensor mode, Tensor curves) -> Tensor");
  m.def(
      "score_proposals(Tensor tokens, Tensor parents, Tensor confidence, Tensor calibrated, Tensor text, Tensor mode, "
      "float floor, Tensor(a!) hits, Tensor(b!) trials, Tensor(c!) surprise) "
      "-> (Tensor reach, Tensor extent, Tensor widths)");
  m.def("proposal_coverage(Tensor parents, Tensor confidence, float floor, int longest) -> (Tensor held, Tensor nodes)");
  m.def(
      "learn_coverage(Tensor(a!) chances, Tensor(b!) common, Tensor(c!) widths, int bit, Tensor slots, Tensor modes, "
      "Tensor asked, Tensor reach, Tensor wide, float row_rate, float all_rate) -> ()");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("recalibrate", &recalibrate);
  m.impl("score_proposals", &score_proposals);
  m.impl("proposal_coverage", &proposal_coverage);
  m.impl("learn_coverage", &learn_coverage);
}

}  // namespace saccade
