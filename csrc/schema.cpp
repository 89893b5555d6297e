// Every native operator, one line each; csrc/<device>/<operator>.cpp implements it.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
  m.def(
      "add_layer_norm_inject_backward_cpu(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor? mean, Tensor rstd, Tensor "
      "weight, Tensor? slots, Tensor? adapter_ids, int adapters) -> (Tensor, Tensor)");
  m.def(
      "add_layer_norm_inject_backward_cuda(Tensor grad, Tensor? grad_sum, Tensor sum, Tensor? mean, Tensor rstd, "
      "Tensor weight, Tensor? slots, bool need_x, bool need_slots) -> (Tensor, Tensor)");
  m.def(
      "add_layer_norm_inject_cpu(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? vectors, Tensor? "
      "slots, Tensor? adapter_ids, float eps, bool rms, bool pre, float dropout_p, Tensor? seed, bool keep) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "add_layer_norm_inject_cuda(Tensor x, Tensor residual, Tensor weight, Tensor? bias, Tensor? vectors, Tensor? "
      "slots, Tensor? adapter_ids, float eps, bool rms, bool pre, float dropout_p, Tensor? seed, bool keep) -> "
      "(Tensor, Tensor, Tensor, Tensor)");
  m.def("checksums_cpu(Tensor[] tensors) -> Tensor");
  m.def(
      "decomposed_prompt_embedding_backward_cpu(Tensor grad, int adapters, int virtual_tokens, int positions, int "
      "rank, Tensor? a, Tensor? b, float scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids, bool "
      "need_prompt, bool need_delta) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def(
      "decomposed_prompt_embedding_backward_cuda(Tensor grad, int adapters, int virtual_tokens, int positions, "
      "Tensor? offsets, bool insert_after_first, Tensor? adapter_ids, bool need_prompt, bool need_delta) -> "
      "(Tensor, Tensor)");
  m.def(
      "decomposed_prompt_embedding_cpu(Tensor input_ids, Tensor weight, Tensor prompt, Tensor? a, Tensor? b, Tensor? "
      "delta, float scale, float embed_scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids) -> "
      "Tensor");
  m.def(
      "decomposed_prompt_embedding_cuda(Tensor input_ids, Tensor weight, Tensor prompt, Tensor? a, Tensor? b, Tensor? "
      "delta, float scale, float embed_scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids) -> "
      "Tensor");
  m.def(
      "label_cross_attention_backward_cpu(Tensor grad_pooled, Tensor features, Tensor weights, Tensor? lengths, "
      "Tensor? offsets, float scale, bool shared) -> Tensor");
  m.def(
      "label_cross_attention_cpu(Tensor queries, Tensor features, Tensor? lengths, Tensor? offsets, float scale, bool "
      "keep) -> (Tensor, Tensor)");
  m.def("label_logits_backward_cpu(Tensor grad_words, Tensor weight, Tensor label_ids) -> Tensor");
  m.def("label_logits_cpu(Tensor hidden, Tensor weight, Tensor label_ids, Tensor? bias, Tensor? positions) -> Tensor");
  m.def(
      "prototype_adam_cpu(Tensor(a!) parameter, Tensor grad, Tensor(b!) mean, Tensor(c!) square, float lr, int step) "
      "-> ()");
  m.def(
      "prototype_cross_entropy_cpu(Tensor projected, Tensor prototypes, Tensor radius, Tensor? scores, float weight, "
      "Tensor labels) -> (Tensor, Tensor, Tensor)");
  m.def("prototype_scores_backward_cpu(Tensor grad, Tensor projected, Tensor prototypes) -> (Tensor, Tensor)");
  m.def(
      "prototype_scores_cpu(Tensor projected, Tensor prototypes, Tensor radius, Tensor? scores, float weight) -> "
      "Tensor");
  m.def(
      "shared_cross_attention_backward_cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, "
      "Tensor out, Tensor lse, Tensor? key_lengths, Tensor? encoder_index, float scale, bool need_query, bool "
      "need_key, bool need_value) -> (Tensor, Tensor, Tensor)");
  m.def(
      "shared_cross_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? encoder_index, "
      "float scale) -> (Tensor, Tensor)");
  m.def(
      "special_token_add_backward_cpu(Tensor grad, Tensor slots, int adapters, int vectors, float dropout_p, Tensor? "
      "seed, Tensor? adapter_ids) -> Tensor");
  m.def(
      "special_token_add_backward_cuda(Tensor grad, Tensor slots, int adapters, int vectors, int? length, float "
      "dropout_p, Tensor? seed, Tensor? adapter_ids) -> Tensor");
  m.def(
      "special_token_add_cpu(Tensor(a!) hidden, Tensor vectors, Tensor slots, float dropout_p, Tensor? seed, Tensor? "
      "adapter_ids) -> ()");
  m.def(
      "special_token_add_cuda(Tensor(a!) hidden, Tensor vectors, Tensor slots, float dropout_p, Tensor? seed, Tensor? "
      "adapter_ids) -> ()");
  m.def(
      "special_token_slots_cpu(Tensor input_ids, Tensor special_ids, Tensor? mask, int max_slots) -> (Tensor, Tensor)");
  m.def(
      "special_token_slots_cuda(Tensor input_ids, Tensor special_ids, Tensor? attention_mask, int max_slots) -> "
      "(Tensor, Tensor)");
}
