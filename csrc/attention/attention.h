// The launcher behind attention.cpp, which has validated the problem.
#pragma once

#include "hwkern.h"

namespace hwkern {

Status launch_attention(const Attention& problem, void* workspace, const Device& device, Stream stream);

}  // namespace hwkern
