// One thread of a warp (sm_90 and newer).
#pragma once

namespace hwkern::ptx {

// True in one thread of a warp whose threads all call it, the same one each time.
// NOTE: in the branch that this decides ptxas issues an instruction of the copy engine as it is. Where it cannot see that a
// single thread asks, as after lane_id == 0, it wraps each in a loop over the threads of the warp.
__device__ __forceinline__ bool elect_one() {
  int elected;
  asm volatile("{\n.reg .pred one;\nelect.sync _|one, 0xffffffff;\nselp.b32 %0, 1, 0, one;\n}\n" : "=r"(elected));
  return elected;
}

}  // namespace hwkern::ptx
