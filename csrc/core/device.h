// What the CUDA runtime says of this machine. Device queries only: nothing here changes a device or allocates.
#pragma once

#include <string>

#include "hwkern.h"

namespace hwkern {

struct DeviceProperties {
  std::string name;
  int compute, sm_count, clock_khz, memory_clock_khz, memory_bus_bits, l2_bytes, shared_bytes_per_sm;
  int shared_bytes;          // the most dynamic shared memory of one block
  size_t memory_bytes;
};

// The number of GPUs; `message` is empty, or the runtime's own sentence why there is none.
int device_count(std::string* message);
void driver_version(int* driver, int* runtime);
Status device_properties(int index, DeviceProperties* properties);

// The current device, cached per index: cheap enough for every launch.
Status current_device(Device* device);

}  // namespace hwkern
