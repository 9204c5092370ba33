// The launches. What they launch is in the folder cuda/, whose headers are part of this file alone:
// everything in them is in the unnamed namespace.
#include <algorithm>

#include "core/cuda_runtime.h"
#include "core/for_each.h"
#include "core/large_gpu.h"
#include "core/reduce.h"
#include "ops/losses/finish.h"
#include "ops/mutual_information/call.h"
#include "ops/mutual_information/cuda/counting.h"
#include "ops/mutual_information/cuda/extremes.h"
#include "ops/mutual_information/cuda/gradient.h"
#include "ops/mutual_information/cuda/information.h"
#include "ops/mutual_information/cuda/joint_counts.h"
#include "ops/mutual_information/mutual_information.h"

namespace regkernels {

namespace {

template <class T>
void launch_count(const Cuda& device, const Counting<T>& counting,
                  const MutualInformationCall& checked) {
  const int tiles = (checked.num_bins + kTile - 1) / kTile;
  const int64_t elements = std::min<int64_t>(counting.elements, 65535);
  // Each multiprocessor of a large GPU gets two blocks, unless there is little for them to do.
  const int64_t wanted =
      std::max<int64_t>(1, 2 * kLargeGpuMultiprocessors / (elements * tiles * tiles));
  const int64_t parts = std::max({std::min(wanted, (counting.samples + 4095) / 4096),
                                  (counting.samples + kMaxBlockSamples - 1) / kMaxBlockSamples});
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(tiles * tiles),
                  static_cast<unsigned>(elements));
  const auto launch = [&](auto* function) {
    function<<<grid, kThreads, 0, device.stream>>>(counting);
    check_launch();
  };
  dispatch_window<T>(checked, [&](auto kernel, auto reach) {
    constexpr auto kKernel = static_cast<ParzenKernel>(decltype(kernel)::value);
    launch(&count_kernel<kKernel, decltype(reach)::value, T>);
  });
}

// Counts the samples of all elements of a loss or a histogram.
template <class T>
Counting<T> count_samples(const Cuda& device, const Call& call) {
  const HistogramOperands<T> histogram(call);
  const MutualInformationCall& checked = histogram.checked;
  const Tensor& extremes = call.output("extremes");
  const Tensor& counts = call.output("counts");
  Counting<T> counting{};
  counting.window = histogram.window;
  counting.pred = histogram.pred;
  counting.target = histogram.target;
  counting.mask = histogram.mask;
  counting.value_range = Operand<const T>(call.input("value_range"));
  counting.space = histogram.space();
  counting.elements = checked.elements();
  counting.samples = checked.samples;
  counting.joint_range = checked.joint_range;
  counting.counts = counts.as<unsigned long long>();
  counting.reach = checked.reach;
  int bits = 0;
  while ((int64_t{1} << bits) < checked.samples) ++bits;
  counting.units = static_cast<double>(int64_t{1} << (62 - bits));
  clear(device, counts);
  if (counting.elements == 0) return counting;
  if (extremes.present) {
    counting.extremes = extremes.as<T>();
    counting.extreme_parts = static_cast<int>(extremes.shape[3]);
    const dim3 grid(static_cast<unsigned>(counting.extreme_parts),
                    static_cast<unsigned>(std::min<int64_t>(counting.elements, 65535)));
    extremes_kernel<<<grid, kThreads, 0, device.stream>>>(
        counting, counting.value_range.data == nullptr, extremes.as<T>());
    check_launch();
  }
  launch_count(device, counting, checked);
  return counting;
}

template <class T>
void run_loss(const Cuda& device, const Call& call) {
  Counting<T> counting = count_samples<T>(device, call);
  counting.normalised = call.flag("normalised");
  counting.smooth_nr = call.number("smooth_nr");
  counting.smooth_dr = call.number("smooth_dr");
  const Tensor& output = call.output("output");
  const Tensor& values = call.output("values");
  if (counting.elements > 0) {
    const auto blocks = static_cast<unsigned>(std::min<int64_t>(counting.elements, 65535));
    information_kernel<<<blocks, kFinishThreads, 0, device.stream>>>(
        counting, output.as<T>(), values.present ? values.as<double>() : nullptr,
        call.output("table").as<T>(), call.output("scaling").as<T>());
    check_launch();
  }
  if (!values.present) return;
  const int64_t groups = output.shape[0];
  const int64_t count = values.shape.count(1);
  const bool mean = call.choice<Reduction>("reduction") == Reduction::kMean;
  sum_groups<double, T>(device, groups, values.as<double>(), count, count,
                        mean && count > 0 ? 1 / static_cast<double>(count) : 1.0, nullptr,
                        output.as<T>());
}

template <class T>
void run_histogram(const Cuda& device, const Call& call) {
  const Counting<T> counting = count_samples<T>(device, call);
  if (counting.elements == 0) return;
  const auto blocks = static_cast<unsigned>(std::min<int64_t>(counting.elements, 65535));
  share_kernel<<<blocks, kFinishThreads, 0, device.stream>>>(
      counting.counts, counting.window.num_bins * counting.window.num_bins, counting.elements,
      call.output("output").as<T>());
  check_launch();
}

template <ParzenKernel kKernel, int kReach, bool kPred, bool kTarget, class T>
void launch_gradient(const Cuda& device, const GradientOperands<T>& gradient,
                     const MutualInformationCall& checked) {
  const int64_t most = shared_memory_limit();
  const int64_t bytes = gradient.table_count * static_cast<int64_t>(sizeof(T));
  int log_copies = 5;
  while (log_copies >= 0 && bytes << log_copies > most) --log_copies;
  auto* function = &gradient_kernel<kKernel, kReach, -1, kPred, kTarget, T>;
  // Where every lane has a copy, in its own bank, a kernel of its own is worth it.
  if constexpr (sizeof(T) == 4 && kReach <= GaussianReach<T>::kNarrow) {
    if (log_copies == 5) function = &gradient_kernel<kKernel, kReach, 5, kPred, kTarget, T>;
  }
  const int64_t shared = log_copies < 0 ? 0 : bytes << log_copies;
  allow_shared_memory(function, shared);
  const int64_t batch = checked.elements() / (gradient.items_together() ? gradient.space.items : 1);
  const int64_t batch_blocks = std::min<int64_t>(batch, 65535);
  // There are as many blocks as a large GPU runs at a time, since each has to fill its shared
  // memory.
  const int64_t together = most / std::max<int64_t>(1, shared);
  const int64_t blocks =
      kLargeGpuMultiprocessors * std::max<int64_t>(1, std::min<int64_t>(2, together));
  const int64_t parts =
      std::max<int64_t>(1, std::min<int64_t>((blocks + batch_blocks - 1) / batch_blocks,
                                             (checked.samples + 4095) / 4096));
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(batch_blocks));
  function<<<grid, kGradientThreads<T>, shared, device.stream>>>(gradient, batch, checked.samples,
                                                                 log_copies);
  check_launch();
}

template <class T>
void run_gradient(const Cuda& device, const Call& call) {
  const HistogramOperands<T> histogram(call);
  const MutualInformationCall& checked = histogram.checked;
  if (checked.elements() * checked.samples == 0) return clear_gradients(device, call);
  const GradientOperands<T> gradient(call, histogram);
  dispatch_smooth_window<T>(checked, [&](auto kernel, auto reach) {
    constexpr auto kKernel = static_cast<ParzenKernel>(decltype(kernel)::value);
    constexpr int kReach = decltype(reach)::value;
    const bool pred = gradient.grad_pred.present(), target = gradient.grad_target.present();
    if (pred && target) {
      launch_gradient<kKernel, kReach, true, true>(device, gradient, checked);
    } else if (pred) {
      launch_gradient<kKernel, kReach, true, false>(device, gradient, checked);
    } else if (target) {
      launch_gradient<kKernel, kReach, false, true>(device, gradient, checked);
    }
  });
}

}  // namespace

void mutual_information_loss_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.input("pred").dtype,
                 [&](auto type) { run_loss<typename decltype(type)::type>(Cuda(context), call); });
}
void mutual_information_loss_grad_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.input("pred").dtype, [&](auto type) {
    run_gradient<typename decltype(type)::type>(Cuda(context), call);
  });
}
void joint_histogram_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.input("pred").dtype, [&](auto type) {
    run_histogram<typename decltype(type)::type>(Cuda(context), call);
  });
}

}  // namespace regkernels
