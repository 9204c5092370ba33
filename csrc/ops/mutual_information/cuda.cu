// The launches. What they launch is in the folder cuda/, whose headers are part of this file alone:
// everything in them is in the unnamed namespace.
#include <algorithm>
#include <limits>
#include <type_traits>

#include "core/cuda_runtime.h"
#include "core/for_each.h"
#include "core/large_gpu.h"
#include "core/reduce.h"
#include "ops/losses/finish.h"
#include "ops/mutual_information/call.h"
#include "ops/mutual_information/cuda/counting.h"
#include "ops/mutual_information/cuda/direct_counts.h"
#include "ops/mutual_information/cuda/extremes.h"
#include "ops/mutual_information/cuda/gradient.h"
#include "ops/mutual_information/cuda/information.h"
#include "ops/mutual_information/cuda/joint_counts.h"
#include "ops/mutual_information/cuda/six_bins.h"
#include "ops/mutual_information/cuda/six_bins_gradient.h"
#include "ops/mutual_information/mutual_information.h"

namespace regkernels {

namespace {

inline unsigned blocks_for(int64_t elements) {
  return static_cast<unsigned>(std::min<int64_t>(elements, 65535));
}

// How many copies of so many bytes fit into shared memory: 2^n, 32 at most; n is negative if none.
inline int log_copies_in_shared_memory(int64_t bytes) {
  const int64_t most = shared_memory_limit();
  int log_copies = 5;
  while (log_copies >= 0 && (bytes << log_copies) > most) --log_copies;
  return log_copies;
}

// Finds the extremes of parts of all elements.
template <class T>
void find_extremes(const Cuda& device, const Call& call, const Tensor& extremes) {
  const HistogramOperands<T> images(call);
  const int64_t elements = images.checked.elements();
  if (elements == 0) return;
  const dim3 grid(static_cast<unsigned>(extremes.shape[3]), blocks_for(elements));
  const bool own_range = !call.input("value_range").present;
  extremes_kernel<<<grid, kThreads, 0, device.stream>>>(images, elements, own_range,
                                                        extremes.as<T>());
  check_launch();
}

template <class T>
void launch_count(const Cuda& device, const Counting<T>& counting) {
  const MutualInformationCall& checked = counting.images.checked;
  const int tiles = (checked.num_bins + kTile - 1) / kTile;
  const int64_t elements = std::min<int64_t>(counting.elements, 65535);
  // Each multiprocessor of a large GPU gets two blocks, unless there is little for them to do.
  const int64_t wanted =
      std::max<int64_t>(1, 2 * kLargeGpuMultiprocessors / (elements * tiles * tiles));
  const int64_t parts = std::max({std::min(wanted, (checked.samples + 4095) / 4096),
                                  (checked.samples + kMaxBlockSamples - 1) / kMaxBlockSamples});
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

// Adds the samples where they belong, if that is a way to count them. It must not depend on the GPU
// whether it is, as the two ways round differently.
bool launch_direct_count(const Cuda& device, const Counting<float>& counting) {
  const MutualInformationCall& checked = counting.images.checked;
  if (!SixBins::suffice(checked, counting.window) || counting.images.mask.present()) return false;
  const DirectTiles tiles(checked.num_bins);
  const int64_t bytes = tiles.bytes();
  const int log_copies = log_copies_in_shared_memory(bytes);
  const int64_t shared = bytes << log_copies;
  const int bits = direct_bits(checked.whole_samples);
  const int64_t elements = std::min<int64_t>(counting.elements, 65535);
  // Each multiprocessor of a large GPU gets a block, unless there is little for them to do, or as
  // many as it takes.
  const int64_t wanted = std::max<int64_t>(1, kLargeGpuMultiprocessors / elements);
  const int64_t most = most_direct_samples(bits, log_copies);
  const int64_t rounds = (checked.samples + wanted * most - 1) / (wanted * most);
  const int64_t parts =
      rounds > 1 ? rounds * wanted
                 : std::max({int64_t{1}, std::min(wanted, (checked.samples + 4095) / 4096),
                             (checked.samples + most - 1) / most});
  const dim3 grid(static_cast<unsigned>(parts), static_cast<unsigned>(elements),
                  static_cast<unsigned>(tiles.count * tiles.count));
  // Where every lane has a copy, in its own bank, a kernel of its own is worth it.
  auto* function =
      log_copies == kLogWarp ? &direct_count_kernel<kLogWarp> : &direct_count_kernel<-1>;
  allow_shared_memory(function, shared);
  function<<<grid, kDirectThreads, shared, device.stream>>>(counting, SixBins(counting.window),
                                                            tiles, bits, log_copies);
  check_launch();
  return true;
}
bool launch_direct_count(const Cuda&, const Counting<double>&) { return false; }

// Counts the samples of all elements, by extremes of whatever number of parts, if they are needed.
template <class T>
void count_samples(const Cuda& device, const Call& call, const Tensor& extremes,
                   const Tensor& counts) {
  const HistogramOperands<T> images(call);
  const MutualInformationCall& checked = images.checked;
  clear(device, counts);
  if (checked.elements() == 0) return;
  const Counting<T> counting{parzen_window<T>(call, checked),
                             images,
                             {call, checked, extremes},
                             checked.elements(),
                             counts.as<unsigned long long>(),
                             checked.count_units(),
                             checked.reach};
  if (!launch_direct_count(device, counting)) launch_count(device, counting);
}

// What a loss and a histogram have in common: the counts go to a workspace.
template <class T>
void count_whole(const Cuda& device, const Call& call) {
  const Tensor& extremes = call.output("extremes");
  if (extremes.present) find_extremes<T>(device, call, extremes);
  count_samples<T>(device, call, extremes, call.output("counts"));
}

template <class T>
Counted<T> counted(const Call& call, const Tensor& extremes, const Tensor& counts) {
  const auto& checked = call.checked<MutualInformationCall>();
  return {Operand<const unsigned long long>(counts),
          {call, checked, extremes},
          checked.elements(),
          checked.num_bins,
          checked.reach,
          checked.count_units(),
          false,
          0,
          0};
}

// From the counts to the loss and what is saved for its gradient.
template <class T>
void inform(const Cuda& device, const Call& call, Counted<T> counted) {
  counted.normalised = call.flag("normalised");
  counted.smooth_nr = call.number("smooth_nr");
  counted.smooth_dr = call.number("smooth_dr");
  const Tensor& output = call.output("output");
  const Tensor& values = call.output("values");
  if (counted.elements > 0) {
    information_kernel<<<blocks_for(counted.elements), kFinishThreads, 0, device.stream>>>(
        counted, output.as<T>(), values.present ? values.as<double>() : nullptr,
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

// From the counts to the shares of the bins.
template <class T>
void share_out(const Cuda& device, const Counted<T>& counted, const Tensor& histogram) {
  if (counted.elements == 0) return;
  share_kernel<<<blocks_for(counted.elements), kFinishThreads, 0, device.stream>>>(
      counted, histogram.as<T>());
  check_launch();
}

template <class T>
void run_loss(const Cuda& device, const Call& call) {
  count_whole<T>(device, call);
  inform(device, call, counted<T>(call, call.output("extremes"), call.output("counts")));
}

template <class T>
void run_histogram(const Cuda& device, const Call& call) {
  count_whole<T>(device, call);
  share_out(device, counted<T>(call, call.output("extremes"), call.output("counts")),
            call.output("output"));
}

template <class T>
void run_extremes(const Cuda& device, const Call& call) {
  const auto& checked = call.checked<MutualInformationCall>();
  const Tensor& extremes = call.output("extremes");
  find_extremes<T>(device, call, extremes);
  if (checked.elements() == 0) return;
  combine_kernel<<<blocks_for(checked.elements()), kWarp, 0, device.stream>>>(
      ScaleOperands<T>(call, checked, extremes), checked.elements(), call.output("output").as<T>());
  check_launch();
}

template <class T>
void run_counts(const Cuda& device, const Call& call) {
  count_samples<T>(device, call, call.input("extremes"), call.output("output"));
}

template <class T>
void run_of_counts(const Cuda& device, const Call& call) {
  const Counted<T> those = counted<T>(call, call.input("extremes"), call.input("counts"));
  inform(device, call, those);
  const Tensor& histogram = call.output("histogram");
  if (histogram.present) share_out(device, those, histogram);
}

// The parts and the batch of the kernels of the gradient. There are as many blocks as a large GPU
// runs at a time, since each has to fill its shared memory.
inline dim3 gradient_grid(const MutualInformationCall& checked, int64_t batch,
                          int64_t shared_bytes) {
  const int64_t batch_blocks = std::min<int64_t>(batch, 65535);
  const int64_t together = shared_memory_limit() / std::max<int64_t>(1, shared_bytes);
  const int64_t blocks =
      kLargeGpuMultiprocessors * std::max<int64_t>(1, std::min<int64_t>(2, together));
  const int64_t most_samples = std::numeric_limits<int32_t>::max() / 2;
  const int64_t parts = std::max({int64_t{1}, (checked.samples + most_samples - 1) / most_samples,
                                  std::min<int64_t>((blocks + batch_blocks - 1) / batch_blocks,
                                                    (checked.samples + 4095) / 4096)});
  return dim3(static_cast<unsigned>(parts), static_cast<unsigned>(batch_blocks));
}

template <bool kPred, bool kTarget>
void launch_six_bins_gradient(const Cuda& device, const GradientOperands<float>& gradient,
                              const MutualInformationCall& checked, int64_t batch) {
  const int64_t bytes = gradient.table_count * static_cast<int64_t>(sizeof(float2));
  const int log_copies = std::min(kLogPairCopies, log_copies_in_shared_memory(bytes));
  const int64_t shared = log_copies < 0 ? 0 : bytes << log_copies;
  auto* function = &six_bins_gradient_kernel<kNoPairs, kPred, kTarget>;
  if (log_copies == kLogPairCopies) {
    function = &six_bins_gradient_kernel<kLogPairCopies, kPred, kTarget>;
  } else if (log_copies >= 0) {
    function = &six_bins_gradient_kernel<kFewerPairCopies, kPred, kTarget>;
  }
  allow_shared_memory(function, shared);
  function<<<gradient_grid(checked, batch, shared), kSixThreads, shared, device.stream>>>(
      gradient, SixBins(gradient.window), batch, log_copies);
  check_launch();
}

template <ParzenKernel kKernel, int kReach, bool kPred, bool kTarget, class T>
void launch_gradient(const Cuda& device, const GradientOperands<T>& gradient,
                     const MutualInformationCall& checked) {
  const int64_t batch = checked.elements() / (gradient.items_together() ? gradient.space.items : 1);
  if constexpr (std::is_same_v<T, float> && kReach == kSixReach) {
    if (SixBins::suffice(checked, gradient.window)) {
      return launch_six_bins_gradient<kPred, kTarget>(device, gradient, checked, batch);
    }
  }
  const int64_t bytes = gradient.table_count * static_cast<int64_t>(sizeof(T));
  const int log_copies = log_copies_in_shared_memory(bytes);
  const int64_t shared = log_copies < 0 ? 0 : bytes << log_copies;
  auto* function = &gradient_kernel<kKernel, kReach, -1, kPred, kTarget, T>;
  // Where every lane has a copy, in its own bank, a kernel of its own is worth it.
  if constexpr (sizeof(T) == 4 && kReach <= GaussianReach<T>::kNarrow) {
    if (log_copies == 5) function = &gradient_kernel<kKernel, kReach, 5, kPred, kTarget, T>;
  }
  allow_shared_memory(function, shared);
  function<<<gradient_grid(checked, batch, shared), kGradientThreads<T>, shared, device.stream>>>(
      gradient, batch, log_copies);
  check_launch();
}

template <class T>
void clear_padding(const Cuda& device, const Tensor& gradient, const OwnSamples& own) {
  const int64_t elements = gradient.shape.count() / own.samples;
  if (elements == 0) return;
  const dim3 grid(2 * kLargeGpuMultiprocessors, blocks_for(elements));
  clear_padding_kernel<<<grid, kPaddingThreads, 0, device.stream>>>(
      Channels<T>(gradient), own, ElementSpace{gradient.shape[1], gradient.shape[2]}, elements);
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
  if (!call.input("own_planes").present) return;
  for (const char* name : {"grad_pred", "grad_target"}) {
    if (call.output(name).present) clear_padding<T>(device, call.output(name), gradient.own);
  }
}

}  // namespace

void mutual_information_loss_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype,
                 [&](auto type) { run_loss<typename decltype(type)::type>(Cuda(context), call); });
}
void mutual_information_loss_grad_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype, [&](auto type) {
    run_gradient<typename decltype(type)::type>(Cuda(context), call);
  });
}
void joint_histogram_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype, [&](auto type) {
    run_histogram<typename decltype(type)::type>(Cuda(context), call);
  });
}
void value_extremes_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype, [&](auto type) {
    run_extremes<typename decltype(type)::type>(Cuda(context), call);
  });
}
void joint_counts_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype, [&](auto type) {
    run_counts<typename decltype(type)::type>(Cuda(context), call);
  });
}
void mutual_information_of_counts_cuda(const Context& context, const Call& call) {
  dispatch_dtype(call.checked<MutualInformationCall>().dtype, [&](auto type) {
    run_of_counts<typename decltype(type)::type>(Cuda(context), call);
  });
}

}  // namespace regkernels
