// Every native operator, one line each; csrc/<device>/<operator>.cpp implements it.

#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY_FRAGMENT(peft_kernels, m) {
  m.def("shared_cross_attention_backward_cpu(Tensor grad_out, Tensor? grad_lse, Tensor query, Tensor key, Tensor value, Tensor out, Tensor lse, Tensor? key_lengths, Tensor? encoder_index, float scale, bool need_query, bool need_key, bool need_value) -> (Tensor, Tensor, Tensor)");
  m.def("shared_cross_attention_cpu(Tensor query, Tensor key, Tensor value, Tensor? key_lengths, Tensor? encoder_index, float scale) -> (Tensor, Tensor)");
}
