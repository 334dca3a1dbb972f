#include "tensorrt/entry_points.h"

#include "tensorrt/log.h"

const char* hwkern_trt_version() { return HWKERN_VERSION; }
void hwkern_trt_set_log(void (*callback)(int, const char*)) { hwkern::trt::set_log(callback); }
size_t hwkern_trt_last_error(char* text, size_t bytes) { return hwkern::trt::last_error(text, bytes); }
