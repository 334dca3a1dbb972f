// The contract of embedding, checked alike on the GPU's and the CPU's way in.
#pragma once

#include "hwkern.h"

namespace hwkern {

Status validate(const Embedding& problem);

}  // namespace hwkern
