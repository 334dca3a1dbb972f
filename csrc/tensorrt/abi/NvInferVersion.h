// The version whose interfaces NvInferRuntime.h beside this file declares.
#pragma once

#define NV_TENSORRT_MAJOR 10
#define NV_TENSORRT_MINOR 1
