// The operators' schemas: torch.ops.saccade.*. What they compute is said at their definitions.
#include <ATen/core/Tensor.h>
#include <torch/library.h>

#include <optional>
#include <tuple>

namespace saccade {

using at::Tensor;

Tensor attend(const Tensor& query, const Tensor& keys, const Tensor& values, const Tensor& visible, const Tensor& tree_mask,
              const Tensor& positions, const Tensor& row_starts, const Tensor& tree_base, const Tensor& page_table,
              const std::optional<Tensor>& sinks, double scale, std::optional<double> soft_cap,
              std::optional<int64_t> window, int64_t first_key);
Tensor rms_norm(const Tensor& x, const Tensor& weight, double eps);
Tensor add_rms_norm(const Tensor& x, const Tensor& residual, const Tensor& weight, double eps);
Tensor rotate_and_store(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& rope,
                        const Tensor& positions, const Tensor& slots, const Tensor& keys, const Tensor& values);
Tensor gated(const Tensor& gate_up, int64_t activation);
Tensor philox_bits(const Tensor& counters, const Tensor& keys);
void fill_noise_rows(const Tensor& bank, at::IntArrayRef places, at::IntArrayRef seeds, at::IntArrayRef positions,
                     at::IntArrayRef choices);
std::tuple<Tensor, Tensor> node_parameters(const Tensor& temperature, const Tensor& first_noise, const Tensor& position,
                                           const Tensor& row, const Tensor& depth, int64_t ring);
Tensor best_ids(const Tensor& logits);
Tensor sample_rows(const Tensor& logits, const Tensor& temperature, const Tensor& noise, const Tensor& noise_row);
std::tuple<Tensor, Tensor> topk_rows(const Tensor& logits, const Tensor& temperature, const Tensor& noise,
                                     const Tensor& noise_row, int64_t k, bool divide);
std::tuple<Tensor, Tensor> top_rows(const Tensor& logits, int64_t k);
std::tuple<Tensor, Tensor> guess_rows(const Tensor& logits, const Tensor& temperature, const Tensor& noise,
                                      const Tensor& noise_row, int64_t k, double tau);

TORCH_LIBRARY(saccade, m) {
  m.def(
      "attend(Tensor query, Tensor keys, Tensor values, Tensor visible, Tensor tree_mask, Tensor positions, "
      "Tensor row_starts, Tensor tree_base, Tensor page_table, Tensor? sinks, float scale, float? soft_cap, int? window, "
      "int first_key) -> Tensor");
  m.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  m.def("add_rms_norm(Tensor x, Tensor(a!) residual, Tensor weight, float eps) -> Tensor");
  m.def(
      "rotate_and_store(Tensor query, Tensor key, Tensor value, Tensor rope, Tensor positions, Tensor slots, "
      "Tensor(a!) keys, Tensor(b!) values) -> Tensor");
  m.def("gated(Tensor gate_up, int activation) -> Tensor");
  m.def("philox_bits(Tensor counters, Tensor keys) -> Tensor");
  m.def("fill_noise_rows(Tensor(a!) bank, int[] places, int[] seeds, int[] positions, int[] choices) -> ()");
  m.def(
      "node_parameters(Tensor temperature, Tensor first_noise, Tensor position, Tensor row, Tensor depth, int ring) "
      "-> (Tensor, Tensor)");
  m.def("best_ids(Tensor logits) -> Tensor");
  m.def("sample_rows(Tensor logits, Tensor temperature, Tensor noise, Tensor noise_row) -> Tensor");
  m.def(
      "topk_rows(Tensor logits, Tensor temperature, Tensor noise, Tensor noise_row, int k, bool divide=False) "
      "-> (Tensor values, Tensor ids)");
  m.def("top_rows(Tensor logits, int k) -> (Tensor values, Tensor ids)");
  m.def(
      "guess_rows(Tensor logits, Tensor temperature, Tensor noise, Tensor noise_row, int k, float tau) "
      "-> (Tensor ids, Tensor confidence)");
}

TORCH_LIBRARY_IMPL(saccade, CPU, m) {
  m.impl("attend", &attend);
  m.impl("rms_norm", &rms_norm);
  m.impl("add_rms_norm", &add_rms_norm);
  m.impl("rotate_and_store", &rotate_and_store);
  m.impl("gated", &gated);
  m.impl("philox_bits", &philox_bits);
  m.impl("fill_noise_rows", &fill_noise_rows);
  m.impl("node_parameters", &node_parameters);
  m.impl("best_ids", &best_ids);
  m.impl("sample_rows", &sample_rows);
  m.impl("topk_rows", &topk_rows);
  m.impl("top_rows", &top_rows);
  m.impl("guess_rows", &guess_rows);
}

}  // namespace saccade
