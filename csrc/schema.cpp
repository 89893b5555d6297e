// Every native operator, one line each; csrc/<device>/<operator>.cpp implements it.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
  m.def("decomposed_prompt_embedding_backward_cpu(Tensor grad, int adapters, int virtual_tokens, int positions, int rank, Tensor? a, Tensor? b, float scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids, bool need_prompt, bool need_delta) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("decomposed_prompt_embedding_backward_cuda(Tensor grad, int adapters, int virtual_tokens, int positions, int rank, Tensor? a, Tensor? b, float scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids, bool need_prompt, bool need_delta) -> (Tensor, Tensor, Tensor, Tensor)");
  m.def("decomposed_prompt_embedding_cpu(Tensor input_ids, Tensor weight, Tensor prompt, Tensor? a, Tensor? b, Tensor? delta, float scale, float embed_scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids) -> Tensor");
  m.def("decomposed_prompt_embedding_cuda(Tensor input_ids, Tensor weight, Tensor prompt, Tensor? a, Tensor? b, Tensor? delta, float scale, float embed_scale, Tensor? offsets, bool insert_after_first, Tensor? adapter_ids) -> Tensor");
  m.def("shared_cross_attention_backward_cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? key_lengths, Tensor? encoder_index, float scale, bool need_query, bool need_key, bool need_value) -> (Tensor, Tensor, Tensor)");
  m.def("shared_cross_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? encoder_index, float scale) -> (Tensor, Tensor)");
}
