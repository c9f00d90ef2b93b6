// A libcuda.so.1 that does nothing but count and check: Triton's own path from Python to a launch, without a GPU.
//
// It takes the place of the driver for what Triton 3.6 and newer call. A launch needs a loaded function, a grid and
// blocks within the limits; a tensor map needs what cuTensorMapEncodeTiled documents. Anything else is an error.
#include <stdint.h>
#include <stdio.h>
#include <string.h>

typedef int CUresult;
typedef unsigned long long CUdeviceptr;
enum { SUCCESS = 0, INVALID_VALUE = 1 };

static long launches, maps;
long stub_launches(void) { return launches; }
long stub_maps(void) { return maps; }

CUresult cuInit(unsigned flags) { return SUCCESS; }
CUresult cuDriverGetVersion(int *version) { *version = 13000; return SUCCESS; }
CUresult cuCtxGetCurrent(void **context) { *context = (void *)1; return SUCCESS; }
CUresult cuCtxSetCurrent(void *context) { return SUCCESS; }
CUresult cuCtxGetDevice(int *device) { *device = 0; return SUCCESS; }
CUresult cuCtxGetLimit(size_t *value, int limit) { *value = 0; return SUCCESS; }
CUresult cuCtxSetLimit(int limit, size_t value) { return SUCCESS; }
CUresult cuDeviceGet(int *device, int ordinal) { *device = ordinal; return SUCCESS; }
CUresult cuDevicePrimaryCtxRetain(void **context, int device) { *context = (void *)1; return SUCCESS; }
CUresult cuGetErrorString(int error, const char **text) { *text = "refused by the stub"; return SUCCESS; }
CUresult cuGetProcAddress_v2(const char *name, void **function, int version, uint64_t flags, void *status) {
  *function = 0;
  return INVALID_VALUE;
}

CUresult cuDeviceGetAttribute(int *value, int attribute, int device) {
  switch (attribute) {
  case 8: *value = 49152; break;    // shared memory of a block
  case 10: *value = 32; break;      // warp size
  case 16: *value = 132; break;     // multiprocessors
  case 81: *value = 233472; break;  // shared memory of a multiprocessor
  case 97: *value = 232448; break;  // shared memory of a block, opted in
  default: *value = 1000;
  }
  return SUCCESS;
}

static char names[4096][64];
static int functions;

CUresult cuModuleLoadData(void **module, const void *image) { *module = (void *)image; return SUCCESS; }
CUresult cuModuleUnload(void *module) { return SUCCESS; }
CUresult cuModuleGetFunction(void **function, void *module, const char *name) {
  if (functions == 4096) return INVALID_VALUE;
  strncpy(names[functions], name, 63);
  *function = &names[functions++];
  return SUCCESS;
}
CUresult cuFuncGetAttribute(int *value, int attribute, void *function) {
  *value = attribute == 0 ? 1024 : 0;  // threads of a block
  return SUCCESS;
}
CUresult cuFuncSetAttribute(void *function, int attribute, int value) { return SUCCESS; }
CUresult cuFuncSetCacheConfig(void *function, int config) { return SUCCESS; }
CUresult cuOccupancyMaxActiveClusters(int *count, void *function, const void *config) { *count = 1; return SUCCESS; }
CUresult cuPointerGetAttribute(void *value, int attribute, CUdeviceptr pointer) {
  *(CUdeviceptr *)value = pointer;
  return SUCCESS;
}

typedef struct {
  unsigned grid_x, grid_y, grid_z, block_x, block_y, block_z, shared_bytes;
  void *stream, *attributes;
  unsigned attribute_count;
} Launch;

CUresult cuLaunchKernelEx(const Launch *launch, void *function, void **arguments, void **extra) {
  int known = (char *)function >= names[0] && (char *)function < names[functions];
  int grid = launch->grid_x && launch->grid_y && launch->grid_z && launch->grid_x <= 2147483647u &&
             launch->grid_y <= 65535 && launch->grid_z <= 65535;
  if (!known || !grid || launch->block_x > 1024 || launch->shared_bytes > 232448) {
    fprintf(stderr, "refused: %s grid %u, %u, %u shared %u\n", known ? (char *)function : "?", launch->grid_x,
            launch->grid_y, launch->grid_z, launch->shared_bytes);
    return INVALID_VALUE;
  }
  launches++;
  return SUCCESS;
}

CUresult cuTensorMapEncodeTiled(void *map, int type, unsigned rank, void *address, const uint64_t *sizes,
                                const uint64_t *strides, const unsigned *box, const unsigned *element_strides,
                                int interleave, int swizzle, int l2, int out_of_bounds) {
  unsigned element_bytes = type == 7 ? 4 : 2;  // CU_TENSOR_MAP_DATA_TYPE_FLOAT32; float16 and bfloat16
  unsigned inner_bytes = box[0] * element_bytes, swizzle_bytes = swizzle ? 16u << swizzle : 1u << 20;
  int fine = (uintptr_t)address % 16 == 0 && inner_bytes % 16 == 0 && inner_bytes <= swizzle_bytes;
  for (unsigned i = 0; i < rank; i++) fine = fine && sizes[i] && sizes[i] <= 1ull << 32 && box[i] && box[i] <= 256;
  for (unsigned i = 0; i + 1 < rank; i++) fine = fine && strides[i] % 16 == 0 && strides[i] < 1ull << 40;
  if (!fine) {
    fprintf(stderr, "refused: a tensor map of %llu x %llu, stride %llu, box %u x %u, swizzle %d\n",
            (unsigned long long)sizes[1], (unsigned long long)sizes[0], (unsigned long long)strides[0], box[1], box[0],
            swizzle);
    return INVALID_VALUE;
  }
  maps++;
  memset(map, 1, 128);
  return SUCCESS;
}
