// The planner's arithmetic for all rows in one call (decoding/market.py and decoding/history.py define what comes out):
// which drafter to ask, and how earlier proposals fared.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <tuple>
#include <vector>

#include "tensors.h"

namespace saccade {

using at::Tensor;

std::tuple<Tensor, Tensor, Tensor> score_proposals(const Tensor& tokens, const Tensor& parents, const Tensor& confidence,
                                                   const Tensor& calibrated, const Tensor& text, const Tensor& mode,
                                                   double floor, const Tensor& hits, const Tensor& trials,
                                                   const Tensor& surprise);
std::tuple<Tensor, Tensor> proposal_coverage(const Tensor& parents, const Tensor& confidence, double floor, int64_t longest);
void learn_coverage(const Tensor& chances, const Tensor& common, const Tensor& widths, int64_t bit, const Tensor& slots,
                    const Tensor& modes, const Tensor& asked, const Tensor& reach, const Tensor& wide, double row_rate,
                    double all_rate);

namespace {

constexpr int64_t kTerms = 7;  // of a drafter, see Terms in decoding/market.py
constexpr int64_t kAhead = 8;

// Seconds of a step by query tokens.
struct Steps {
  const double* seconds;
  int64_t largest;

  double at(double tokens) const { return seconds[std::min(static_cast<int64_t>(tokens + 0.5), largest)]; }
};

struct Offer {
  int64_t member = -1, depth = 0;
  double gain = 0, rate = 0;
  std::vector<int64_t> rows;
};

}  // namespace

std::tuple<std::vector<double>, std::vector<double>, double, std::vector<double>, std::vector<int64_t>> weigh_drafting(
    at::TensorList parents, at::TensorList confidence, double floor, const Tensor& chances, const Tensor& slots,
    const Tensor& widths, const Tensor& steps, int64_t tokens, double extra, at::ArrayRef<double> terms,
    at::ArrayRef<double> late) {
  const int64_t rows = slots.numel(), drafters = chances.size(1), depths = chances.size(2);
  const int64_t members = terms.size() / kTerms;
  TORCH_CHECK_VALUE(int64_t(late.size()) == members * rows && widths.size(1) == depths && chances.is_contiguous() &&
                        widths.is_contiguous() && steps.is_contiguous(),
                    "weigh_drafting: shapes do not fit together");
  const Steps price{steps.const_data_ptr<double>(), steps.numel() - 1};
  const int64_t* slot = index_data<int64_t>(slots, "slots");
  std::vector<double> held(rows * depths, 0.0), guessed(rows, 0.0), parts;
  for (size_t i = 0; i < parents.size(); ++i) {
    const auto [part, nodes] = proposal_coverage(parents[i], confidence[i], floor, depths);
    double tokens_held = 0, all_nodes = 0;
    for (int64_t j = 0; j < rows * depths; ++j) {
      const double here = part.const_data_ptr<double>()[j];
      tokens_held += here;
      held[j] = std::max(held[j], here);
    }
    for (int64_t row = 0; row < rows; ++row) {
      guessed[row] += nodes.const_data_ptr<int64_t>()[row];
      all_nodes += nodes.const_data_ptr<int64_t>()[row];
    }
    parts.insert(parts.end(), {tokens_held, all_nodes});
  }
  double all_held = 0, all_guessed = 0;
  for (const double each : held) all_held += each;
  for (const double each : guessed) all_guessed += each;
  const double base = tokens + all_guessed;
  Offer best;
  best.rate = std::max((rows + all_held) / (price.at(base) + extra), rows / (price.at(tokens) + extra));
  const double pace = 1 / best.rate, node = (price.at(base + kAhead) - price.at(base)) / kAhead;
  std::vector<double> gain(rows * depths);
  for (int64_t m = 0; m < members; ++m) {
    const double* term = terms.data() + m * kTerms;
    const double* waiting = late.data() + m * rows;
    const int64_t bit = static_cast<int64_t>(term[0]), deepest = static_cast<int64_t>(term[6]);
    TORCH_CHECK_VALUE(bit >= 0 && bit < drafters && deepest <= depths, "weigh_drafting: no such drafter or depth");
    for (int64_t row = 0; row < rows; ++row) {
      const double* chance = chances.const_data_ptr<double>() + (slot[row] * drafters + bit) * depths;
      double covered = 1, sum = 0;
      for (int64_t level = 0; level < deepest; ++level) {
        covered *= chance[level];
        sum += covered * (1 - held[row * depths + level]);
        gain[row * depths + level] = sum * term[5];
      }
    }
    double nodes = 0;
    for (int64_t level = 0; level < deepest; ++level) {
      nodes += widths.const_data_ptr<double>()[bit * depths + level];
      const double own = term[2] + level * term[4] + node * nodes;  // seconds of a row
      double promised = 0, delay = 0;
      int64_t count = 0;
      for (int64_t row = 0; row < rows; ++row)
        if (waiting[row] >= 0 && gain[row * depths + level] * pace > own + waiting[row]) {
          ++count;
          promised += gain[row * depths + level];
          delay += waiting[row];
        }
      if (!count) continue;
      const double drafting = term[1] + term[2] * count + level * (term[3] + term[4] * count);
      const double rate = (rows + all_held + promised) / (price.at(base + count * nodes) + extra + drafting + delay);
      if (rate <= best.rate) continue;
      best = {m, level + 1, promised, rate, {}};
      for (int64_t row = 0; row < rows; ++row)
        if (waiting[row] >= 0 && gain[row * depths + level] * pace > own + waiting[row]) best.rows.push_back(row);
    }
  }
  std::vector<int64_t> offer{best.member, best.depth};
  offer.insert(offer.end(), best.rows.begin(), best.rows.end());
  return {parts, guessed, all_held, {best.gain, best.rate}, offer};
}

void judge_proposals(at::TensorList texts, at::IntArrayRef lengths, const Tensor& modes, at::IntArrayRef slots,
                     at::TensorList tokens, at::TensorList parents, at::TensorList confidence, at::TensorList calibrated,
                     double floor, at::IntArrayRef bits, at::TensorList hits, at::TensorList trials,
                     at::TensorList surprise, const Tensor& chances, const Tensor& common, const Tensor& widths,
                     double row_rate, double all_rate) {
  const int64_t rows = texts.size(), depths = widths.size(1);
  const Tensor came = empty({rows, depths}, at::kLong), asked = empty({rows}, at::kLong), where = empty({rows}, at::kLong);
  std::vector<int64_t> known(rows);
  for (int64_t row = 0; row < rows; ++row) {
    const int64_t* text = index_data<int64_t>(texts[row], "text");
    known[row] = std::max<int64_t>(0, std::min<int64_t>(depths, texts[row].numel() - lengths[row]));
    int64_t* to = came.mutable_data_ptr<int64_t>() + row * depths;
    std::copy_n(text + lengths[row], known[row], to);
    std::fill(to + known[row], to + depths, -1);
    where.mutable_data_ptr<int64_t>()[row] = slots[row];
  }
  for (size_t i = 0; i < bits.size(); ++i) {
    const auto [reach, extent, wide] = score_proposals(tokens[i], parents[i], confidence[i], calibrated[i], came, modes, floor,
                                                       hits[i], trials[i], surprise[i]);
    for (int64_t row = 0; row < rows; ++row)
      asked.mutable_data_ptr<int64_t>()[row] = std::min(extent.const_data_ptr<int64_t>()[row], known[row]);
    learn_coverage(chances, common, widths, bits[i], where, modes, asked, reach, wide, row_rate, all_rate);
  }
}

TORCH_LIBRARY_FRAGMENT(saccade, m) {
  m.def(
      "weigh_drafting(Tensor[] parents, Tensor[] confidence, float floor, Tensor chances, Tensor slots, Tensor widths, "
      "Tensor steps, int tokens, float extra, float[] terms, float[] late) -> (float[], float[], float, float[], int[])");
  m.def(
      "judge_proposals(Tensor[] texts, int[] lengths, Tensor modes, int[] slots, Tensor[] tokens, Tensor[] parents, "
      "Tensor[] confidence, Tensor[] calibrated, float floor, int[] bits, Tensor(a!)[] hits, Tensor(b!)[] trials, "
      "Tensor(c!)[] surprise, Tensor(d!) chances, Tensor(e!) common, Tensor(f!) widths, float row_rate, float all_rate) "
      "-> ()");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("weigh_drafting", &weigh_drafting);
  m.impl("judge_proposals", &judge_proposals);
}

}  // namespace saccade
