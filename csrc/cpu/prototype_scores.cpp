// prototype_scores, its backward and prototype_cross_entropy on the CPU: checks, division into tasks, the softmax of a
// few classes.

#include "prototype_scores.h"

#include <cmath>
#include <tuple>

#include "host.h"

namespace {

constexpr int64_t kTaskWork = 1 << 16;  // multiplications per task that are worth a thread

struct Range {
  int64_t begin, end;
};

std::vector<Range> ranges(int64_t count, int64_t work_of_one) {
  const int64_t step = std::max<int64_t>(1, kTaskWork / std::max<int64_t>(1, work_of_one));
  std::vector<Range> result;
  for (int64_t i = 0; i < count; i += step) result.push_back({i, std::min(i + step, count)});
  return result;
}

template <class F>
void for_each_of(int64_t count, int64_t work_of_one, const F& f) {
  for_each_task(ranges(count, work_of_one), [&](const Range& range, const Range*) {
    for (int64_t i = range.begin; i < range.end; ++i) f(i);
  });
}

const float* floats(const Tensor& x, std::initializer_list<int64_t> sizes, const char* name) {
  bool fits = x.is_cpu() && x.scalar_type() == ScalarType::Float && x.is_contiguous() &&
              x.dim() == static_cast<int64_t>(sizes.size());
  for (int64_t i = 0; fits && i < x.dim(); ++i) fits = x.size(i) == sizes.begin()[i];
  STD_TORCH_CHECK(fits, name, " must be a contiguous float32 CPU tensor whose shape fits the others");
  return static_cast<const float*>(x.const_data_ptr());
}

// The inputs of the scores, and the intermediate results that the gradient reuses.
struct Problem {
  Prototypes prototypes;
  const float *projected, *radius, *scores;
  float weight;
  int64_t texts;
  std::vector<float> normals, distances, inverse_lengths;

  Problem(const Tensor& x, const Tensor& p) : radius(nullptr), scores(nullptr), weight(0), texts(x.size(0)) {
    STD_TORCH_CHECK(x.dim() == 2 && p.dim() == 2, "projected must be (N, D) and prototypes (C, D)");
    prototypes = {floats(p, {p.size(0), x.size(1)}, "prototypes"), p.size(0), x.size(1)};
    projected = floats(x, {texts, prototypes.width}, "projected");
    normals.resize(texts * prototypes.width);
    distances.resize(texts * prototypes.count);
    inverse_lengths.resize(texts);
  }

  Problem(const Tensor& x, const Tensor& p, const Tensor& radii, const std::optional<Tensor>& given, double w)
      : Problem(x, p) {
    radius = floats(radii, {prototypes.count}, "radius");
    scores = given ? floats(*given, {texts, prototypes.count}, "scores") : nullptr;
    weight = static_cast<float>(w);
  }

  int64_t work() const { return prototypes.count * prototypes.width; }

  float* normal(int64_t i) { return normals.data() + i * prototypes.width; }

  float* distance(int64_t i) { return distances.data() + i * prototypes.count; }

  void measure(const PrototypeKernels& kernel, int64_t i) {
    inverse_lengths[i] = kernel.measure(prototypes, projected + i * prototypes.width, normal(i), distance(i));
  }

  float score(int64_t i, int64_t k) {
    const float q = radius[k] - distance(i)[k];
    return scores ? q + weight * scores[i * prototypes.count + k] : q;
  }

  // Computes the gradient of the projected row; `pulls` holds gradients of scores and is divided by the distances in
  // place.
  void backward(const PrototypeKernels& kernel, int64_t i, float* pulls, float* grad) {
    for (int64_t k = 0; k < prototypes.count; ++k) pulls[k] = distance(i)[k] == 0 ? 0 : pulls[k] / distance(i)[k];
    kernel.backward(prototypes, normal(i), pulls, inverse_lengths[i], grad);
  }
};

Tensor forward(const Tensor& projected, const Tensor& prototypes, const Tensor& radius,
               const std::optional<Tensor>& scores, double weight) {
  Problem problem(projected, prototypes, radius, scores, weight);
  const int64_t classes = problem.prototypes.count;
  Tensor out = torch::stable::new_empty(projected, {problem.texts, classes});
  const auto to = static_cast<float*>(out.mutable_data_ptr());
  const PrototypeKernels& kernel = KERNELS_FOR_THIS_CPU(kPrototypeKernels);
  for_each_of(problem.texts, problem.work(), [&](int64_t i) {
    problem.measure(kernel, i);
    for (int64_t k = 0; k < classes; ++k) to[i * classes + k] = problem.score(i, k);
  });
  return out;
}

std::tuple<Tensor, Tensor> backward(const Tensor& grad, const Tensor& projected, const Tensor& prototypes) {
  Problem problem(projected, prototypes);
  const int64_t classes = problem.prototypes.count, width = problem.prototypes.width;
  const float* from = floats(grad, {problem.texts, classes}, "grad");
  std::vector<float> pulls(from, from + problem.texts * classes);
  Tensor grad_projected = torch::stable::new_empty(projected, {problem.texts, width});
  Tensor grad_prototypes = torch::stable::new_empty(prototypes, {classes, width});
  const auto to_projected = static_cast<float*>(grad_projected.mutable_data_ptr());
  const auto to_prototypes = static_cast<float*>(grad_prototypes.mutable_data_ptr());
  const PrototypeKernels& kernel = KERNELS_FOR_THIS_CPU(kPrototypeKernels);
  for_each_of(problem.texts, problem.work(), [&](int64_t i) {
    problem.measure(kernel, i);
    problem.backward(kernel, i, pulls.data() + i * classes, to_projected + i * width);
  });
  for_each_of(classes, problem.texts * width, [&](int64_t k) {
    kernel.prototype_backward(problem.prototypes.data + k * width, problem.normals.data(), pulls.data() + k,
                              problem.texts, classes, width, to_prototypes + k * width);
  });
  return {grad_projected, grad_prototypes};
}

std::tuple<Tensor, Tensor, Tensor> cross_entropy(const Tensor& projected, const Tensor& prototypes,
                                                 const Tensor& radius, const std::optional<Tensor>& scores,
                                                 double weight, const Tensor& labels) {
  Problem problem(projected, prototypes, radius, scores, weight);
  const int64_t texts = problem.texts, classes = problem.prototypes.count, width = problem.prototypes.width;
  const auto label_of = to_vector(labels, texts, "labels");
  for (const int64_t label : label_of)
    STD_TORCH_CHECK(0 <= label && label < classes, "labels must lie in [0, ", classes, "), got ", label);
  Tensor loss = torch::stable::new_empty(projected, {});
  Tensor grad_projected = torch::stable::new_empty(projected, {texts, width});
  Tensor grad_radius = torch::stable::new_empty(projected, {classes});
  const auto to_projected = static_cast<float*>(grad_projected.mutable_data_ptr());
  const auto to_radius = static_cast<float*>(grad_radius.mutable_data_ptr());
  std::vector<double> losses(texts), radius_sums(classes, 0.0);
  std::vector<float> grads(texts * classes), pulls(texts * classes);
  const PrototypeKernels& kernel = KERNELS_FOR_THIS_CPU(kPrototypeKernels);
  for_each_of(texts, problem.work(), [&](int64_t i) {
    problem.measure(kernel, i);
    float* const grad = grads.data() + i * classes;
    for (int64_t k = 0; k < classes; ++k) grad[k] = problem.score(i, k);
    const double most = *std::max_element(grad, grad + classes), own = grad[label_of[i]];
    double sum = 0;
    for (int64_t k = 0; k < classes; ++k) {
      const double power = std::exp(grad[k] - most);
      sum += power;
      grad[k] = static_cast<float>(power);
    }
    losses[i] = std::log(sum) + most - own;
    for (int64_t k = 0; k < classes; ++k) {
      grad[k] = static_cast<float>((grad[k] / sum - (k == label_of[i])) / texts);
      pulls[i * classes + k] = grad[k];
    }
    problem.backward(kernel, i, pulls.data() + i * classes, to_projected + i * width);
  });
  double total = 0;
  for (int64_t i = 0; i < texts; ++i) {
    total += losses[i];
    for (int64_t k = 0; k < classes; ++k) radius_sums[k] += grads[i * classes + k];
  }
  *static_cast<float*>(loss.mutable_data_ptr()) = static_cast<float>(total / std::max<int64_t>(1, texts));
  std::copy(radius_sums.begin(), radius_sums.end(), to_radius);
  return {loss, grad_projected, grad_radius};
}

// One step of torch.optim.Adam with its defaults but for the rate; `step` counts from 1.
void adam(Tensor parameter, const Tensor& grad, Tensor mean, Tensor square, double lr, int64_t step) {
  const int64_t count = parameter.numel();
  for (const Tensor* x : std::initializer_list<const Tensor*>{&parameter, &grad, &mean, &square}) {
    const bool fits = x->is_cpu() && x->scalar_type() == ScalarType::Float && x->is_contiguous() && x->numel() == count;
    STD_TORCH_CHECK(fits, "parameter, grad, mean and square must be contiguous float32 CPU tensors of one size");
  }
  STD_TORCH_CHECK(step >= 1, "step must be at least 1, got ", step);
  constexpr float kBeta1 = 0.9, kRest1 = 0.1, kBeta2 = 0.999, kRest2 = 0.001;
  const float rate = static_cast<float>(lr / (1 - std::pow(0.9, step)));
  const float root_factor = static_cast<float>(1 / std::sqrt(1 - std::pow(0.999, step)));
  const auto floats_of = [](Tensor& x) { return static_cast<float*>(x.mutable_data_ptr()); };
  float *const p = floats_of(parameter), *const m = floats_of(mean), *const v = floats_of(square);
  const auto g = static_cast<const float*>(grad.const_data_ptr());
  const PrototypeKernels& kernel = KERNELS_FOR_THIS_CPU(kPrototypeKernels);
  for_each_task(ranges(count, 1), [&](const Range& range, const Range*) {
    const int64_t i = range.begin;
    kernel.adam({p + i, m + i, v + i, g + i, range.end - i, kBeta1, kRest1, kBeta2, kRest2, rate, root_factor, 1e-8f});
  });
}

STABLE_TORCH_LIBRARY_IMPL(peft_kernels, CPU, m) {
  m.impl("prototype_adam_cpu", TORCH_BOX(&adam));
  m.impl("prototype_scores_cpu", TORCH_BOX(&forward));
  m.impl("prototype_scores_backward_cpu", TORCH_BOX(&backward));
  m.impl("prototype_cross_entropy_cpu", TORCH_BOX(&cross_entropy));
}

}  // namespace
