/* A CUDA driver whose device memory is host memory: the entry points that engines/backends/cuda.py calls, with the
 * signatures of cuda.h and the errors of the real driver. It proves our calls through ctypes (argument widths, the
 * current context, who frees what); it proves nothing about a GPU. */
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };
enum { BIG = 1 << 30, DEPTH = 8 };

typedef unsigned long long address;

static int initialized, retained, streams, buffers, depth;
static void *stack[DEPTH];
static char context, stream;

static int ready(void) { return depth > 0 && stack[depth - 1] == &context ? OK : INVALID_CONTEXT; }

/* What a test asks: everything still held. */
int host_driver_held(void) { return retained + streams + buffers + depth; }

int cuInit(unsigned int flags) {
  const char *failure = getenv("HOST_DRIVER_INIT_FAILS");
  if (failure) return atoi(failure);
  initialized = 1;
  return flags == 0 ? OK : INVALID_VALUE;
}

int cuGetErrorName(int error, const char **name) {
  *name = error == 100 ? "CUDA_ERROR_NO_DEVICE"
          : error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT" : NULL;
  return *name ? OK : INVALID_VALUE;
}

int cuDriverGetVersion(int *version) { *version = 13010; return OK; }

int cuDeviceGetCount(int *count) {
  *count = getenv("HOST_DRIVER_NO_GPU") ? 0 : 1;
  return initialized ? OK : NOT_INITIALIZED;
}

int cuDeviceGet(int *device, int ordinal) { *device = ordinal; return ordinal == 0 ? OK : INVALID_VALUE; }

int cuDeviceGetName(char *name, int length, int device) {
  strncpy(name, "Host Memory", (size_t)length);
  return device == 0 ? OK : INVALID_VALUE;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
  const char *capability = getenv("HOST_DRIVER_CAPABILITY"); /* "8.9" */
  if (device != 0 || !capability) return INVALID_VALUE;
  *value = attribute == 75 ? capability[0] - '0' : attribute == 76 ? capability[2] - '0' : -1;
  return *value < 0 ? INVALID_VALUE : OK;
}

int cuDeviceGetPCIBusId(char *id, int length, int device) {
  strncpy(id, "00000000:0A:00.0", (size_t)length);
  return device == 0 ? OK : INVALID_VALUE;
}

int cuDevicePrimaryCtxRetain(void **out, int device) { *out = &context; retained++; return device; }

int cuDevicePrimaryCtxRelease_v2(int device) { retained--; return device; }

int cuCtxPushCurrent_v2(void *pushed) {
  if (depth == DEPTH || pushed != &context) return INVALID_CONTEXT;
  stack[depth++] = pushed;
  return OK;
}

int cuCtxPopCurrent_v2(void **popped) {
  if (depth == 0) return INVALID_CONTEXT;
  *popped = stack[--depth];
  return OK;
}

int cuMemAlloc_v2(address *out, size_t size) {
  if (size == 0) return INVALID_VALUE;
  if (size > BIG) return OUT_OF_MEMORY;
  *out = (address)malloc(size);
  buffers++;
  return ready();
}

int cuMemFree_v2(address freed) { free((void *)freed); buffers--; return ready(); }

int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t size, void *on) {
  if (on != &stream) return INVALID_HANDLE;
  memcpy((void *)to, from, size);
  return ready();
}

int cuMemcpyDtoHAsync_v2(void *to, address from, size_t size, void *on) {
  if (on != &stream) return INVALID_HANDLE;
  memcpy(to, (const void *)from, size);
  return ready();
}

int cuStreamCreate(void **out, unsigned int flags) { *out = &stream; streams++; return flags == 1 ? ready() : INVALID_VALUE; }

int cuStreamDestroy_v2(void *destroyed) { streams--; return destroyed == &stream ? ready() : INVALID_HANDLE; }

int cuStreamSynchronize(void *waited) { return waited == &stream ? ready() : INVALID_HANDLE; }
