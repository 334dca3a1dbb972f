// Of the fused operators what hwkern.h leaves out.
#pragma once

#include "hwkern.h"

namespace hwkern {

// The contract of norm_quantize, checked alike on the GPU's and the CPU's way in.
Status validate(const NormQuantize& problem);

// activation_quantize, which also stores what it rounds q from: y [M, K] of x_dtype, dense rows. For a product of 16-bit
// rows (W8A16), which leaves q and scale unread.
Status activation_quantize(const ActivationQuantize& problem, void* y, Stream stream);

}  // namespace hwkern
