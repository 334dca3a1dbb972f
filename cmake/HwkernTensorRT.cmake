# The TensorRT plugins: libhwkern_trt.so (TensorRT 10.1 and newer, TensorRT-RTX), and libhwkern_trt8.so (TensorRT 8.6)
# where NVIDIA's headers of that version are. Nothing of TensorRT is linked. NVIDIA's headers are in NVIDIA/TensorRT's
# repository (include/, Apache-2.0) and in Debian's and NVIDIA's -dev packages, and in no wheel; where there are none of
# 10.1 or newer, csrc/tensorrt/abi declares what the plugin implements.
#
#   HWKERN_TENSORRT_INCLUDE_DIR    the folder of NvInferRuntime.h 10.1 or newer
#   HWKERN_TENSORRT8_INCLUDE_DIR   the same of 8.6
# Both may also stand in the environment. Without them the system's include folders are searched.

# hwkern_tensorrt_version(FOLDER OUT): "10.13" or "8.6"; empty when FOLDER has no such headers.
function(hwkern_tensorrt_version folder out)
  set(${out} "" PARENT_SCOPE)
  if(NOT EXISTS "${folder}/NvInferVersion.h")
    return()
  endif()
  # From 10.13 on NV_TENSORRT_MAJOR is defined through TRT_MAJOR_ENTERPRISE.
  file(STRINGS "${folder}/NvInferVersion.h" lines REGEX "define (NV_TENSORRT|TRT)_(MAJOR|MINOR)(_ENTERPRISE)? +[0-9]+")
  foreach(part MAJOR MINOR)
    if("${lines}" MATCHES "_${part}(_ENTERPRISE)? +([0-9]+)")
      set(${part} ${CMAKE_MATCH_2})
    endif()
  endforeach()
  set(${out} "${MAJOR}.${MINOR}" PARENT_SCOPE)
endfunction()

# hwkern_tensorrt_headers(VARIABLE LOWEST BELOW): the folder of headers with LOWEST <= version < BELOW in VARIABLE, a
# cache entry. A folder that was named and does not fit is an error.
function(hwkern_tensorrt_headers variable lowest below)
  set(named "${${variable}}")
  if(NOT named)
    set(named "$ENV{${variable}}")
  endif()
  if(named)
    hwkern_tensorrt_version("${named}" version)
    if(NOT version OR version VERSION_LESS ${lowest} OR version VERSION_GREATER_EQUAL ${below})
      message(FATAL_ERROR
        "hwkern: ${variable}=${named} has ${version} as TensorRT's version; a folder with NvInferRuntime.h of version "
        "${lowest} or newer, below ${below}, is needed.")
    endif()
  else()
    find_path(found NvInferRuntime.h PATH_SUFFIXES tensorrt NO_CACHE)
    if(found)
      hwkern_tensorrt_version("${found}" version)
      if(version AND version VERSION_GREATER_EQUAL ${lowest} AND version VERSION_LESS ${below})
        set(named "${found}")
      endif()
    endif()
  endif()
  set(${variable} "${named}" CACHE PATH "NvInferRuntime.h of TensorRT ${lowest} or newer, below ${below}" FORCE)
  if(named)
    message(STATUS "hwkern: TensorRT ${version} headers in ${named}")
  endif()
endfunction()

# hwkern_tensorrt_plugin(NAME INCLUDE_DIR SOURCE): one plugin library, installed beside _C.
function(hwkern_tensorrt_plugin name include_dir source)
  add_library(${name} SHARED
    csrc/tensorrt/entry_points.cpp
    csrc/tensorrt/log.cpp
    csrc/tensorrt/op.cpp
    csrc/tensorrt/run.cpp
    ${source})
  target_include_directories(${name} SYSTEM PRIVATE "${include_dir}")
  target_compile_definitions(${name} PRIVATE
    HWKERN_VERSION="${SKBUILD_PROJECT_VERSION_FULL}"
    HWKERN_WEIGHT_ONLY=${HWKERN_WEIGHT_ONLY} HWKERN_NORM_QUANTIZE=${HWKERN_NORM_QUANTIZE})
  target_compile_options(${name} PRIVATE ${HWKERN_WARNINGS} -Wno-deprecated-declarations)
  target_link_libraries(${name} PRIVATE hwkern_host)
  # The entry points and nothing else.
  target_link_options(${name} PRIVATE
    "-Wl,--version-script=${PROJECT_SOURCE_DIR}/csrc/tensorrt/exports.map" -Wl,--no-undefined)
  set_target_properties(${name} PROPERTIES LINK_DEPENDS "${PROJECT_SOURCE_DIR}/csrc/tensorrt/exports.map")
  install(TARGETS ${name} LIBRARY DESTINATION hwkern)
endfunction()

# What a plugin offers depends on what hwkern.h has: w8a16 needs weight_only_linear(), NormLinearInt8 norm_quantize().
function(hwkern_has entry_point variable)
  file(STRINGS csrc/hwkern.h found REGEX "^Status ${entry_point}\\(")
  if(found)
    set(${variable} 1 PARENT_SCOPE)
  else()
    set(${variable} 0 PARENT_SCOPE)
  endif()
endfunction()
hwkern_has(weight_only_linear HWKERN_WEIGHT_ONLY)
hwkern_has(norm_quantize HWKERN_NORM_QUANTIZE)

if(NOT HWKERN_CUDA OR NOT CMAKE_SYSTEM_NAME STREQUAL "Linux")
  message(STATUS "hwkern: no TensorRT plugins in a build without GPU kernels, or for another system than Linux")
  return()
endif()
hwkern_tensorrt_headers(HWKERN_TENSORRT_INCLUDE_DIR 10.1 12)
hwkern_tensorrt_headers(HWKERN_TENSORRT8_INCLUDE_DIR 8.6 8.7)
set(include_dir "${HWKERN_TENSORRT_INCLUDE_DIR}")
if(NOT include_dir)
  set(include_dir "${PROJECT_SOURCE_DIR}/csrc/tensorrt/abi")
endif()
hwkern_tensorrt_plugin(hwkern_trt "${include_dir}" csrc/tensorrt/plugin_v3.cpp)
if(HWKERN_TENSORRT8_INCLUDE_DIR)
  hwkern_tensorrt_plugin(hwkern_trt8 "${HWKERN_TENSORRT8_INCLUDE_DIR}" csrc/tensorrt/plugin_v2.cpp)
else()
  message(STATUS "hwkern: no headers of TensorRT 8.6 found, so its plugin is left out; name them with "
    "-DHWKERN_TENSORRT8_INCLUDE_DIR=…")
endif()
