// A ring of shared-memory buffers that the copy engine fills and consumers empty, with two barriers a buffer.
#pragma once

#include <cstdint>

namespace hwkern {

// A position in the ring: the buffer, and the parity of the phase that its barriers are in.
template <int STAGES>
struct RingPosition {
  int stage = 0;
  uint32_t parity = 0;
  __device__ __forceinline__ void advance() {
    if (++stage == STAGES) stage = 0, parity ^= 1;
  }
  __device__ __forceinline__ void skip(int steps) {
    stage += steps % STAGES;
    parity ^= (steps / STAGES + stage / STAGES) & 1;
    stage %= STAGES;
  }
};

}  // namespace hwkern
