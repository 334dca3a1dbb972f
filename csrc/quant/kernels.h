// The launchers behind quant.cpp and fused.cpp, which have validated the problems.
#pragma once

#include "hwkern.h"

namespace hwkern {

Status validate_quantize(const Quantize& problem);  // the contract of hwkern.h

// As in hwkern.h. `release_early`: the next kernel on the stream may start while the one before this still runs. It must
// wait for this one before it touches anything that the one before reads or writes.
Status quantize_per_token(const Quantize& problem, bool release_early, Stream stream);

Status launch_quantize_per_token(const Quantize& problem, bool release_early, Stream stream);
Status launch_quantize_static(const Quantize& problem, ScaleAxis axis, Stream stream);
Status launch_dequantize(const Dequantize& problem, ScaleAxis axis, Stream stream);
Status launch_norm_quantize(const NormQuantize& problem, const Device& device, Stream stream);
Status launch_activation_quantize(const ActivationQuantize& problem, void* y, const Device& device, Stream stream);
Status launch_embedding(const Embedding& problem, const Device& device, Stream stream);

}  // namespace hwkern
