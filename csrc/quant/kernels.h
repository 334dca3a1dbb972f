// The launchers behind quant.cpp, which has validated the problems.
#pragma once

#include "hwkern.h"

namespace hwkern {

// `release_early`: the next kernel on the stream may start before this one's predecessor has ended. It waits for this
// one, so for that predecessor too, before it touches anything but constant weights (see Overlap in hwkern.h).
Status quantize_per_token(const Quantize& problem, bool release_early, Stream stream);
Status launch_quantize_per_token(const Quantize& problem, bool release_early, Stream stream);
Status launch_quantize_static(const Quantize& problem, ScaleAxis axis, Stream stream);
Status launch_dequantize(const Dequantize& problem, ScaleAxis axis, Stream stream);

}  // namespace hwkern
