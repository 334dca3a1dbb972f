// The contract of norm_quantize, checked alike on the GPU's and the CPU's way in.
#pragma once

#include "hwkern.h"

namespace hwkern {

Status validate(const NormQuantize& problem);

}  // namespace hwkern
