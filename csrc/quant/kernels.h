// The launchers behind quant.cpp, which has validated the problems.
#pragma once

#include "hwkern.h"

namespace hwkern {

Status launch_quantize_per_token(const Quantize& problem, Stream stream);
Status launch_quantize_static(const Quantize& problem, ScaleAxis axis, Stream stream);
Status launch_dequantize(const Dequantize& problem, ScaleAxis axis, Stream stream);

}  // namespace hwkern
