// Stands in for the GPU driver's library, so that the very calls that cuda-bindings passes on are seen without a GPU.
// It writes a line for every call, and refuses as the real one does what needs a context that the thread has not entered.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdint.h>
#include <stdio.h>

enum { SUCCESS = 0, INVALID_VALUE = 1, INVALID_CONTEXT = 201, NOT_FOUND = 500 };

static __thread uintptr_t current;  // 0x100 and on: the primary contexts of GPU 0 and on
static uintptr_t modules = 0x1000;  // the last three digits of a module and its functions are their context

// Python has a buffer of its own for the same output: lines must come out in order.
__attribute__((constructor)) static void unbuffered(void) { setvbuf(stdout, NULL, _IONBF, 0); }

int cuGetProcAddress_v2(const char* name, void** found, int version, uint64_t flags, int* status) {
  *found = dlsym(RTLD_DEFAULT, name);
  return *found ? SUCCESS : NOT_FOUND;
}

int cuDeviceGet(int* device, int ordinal) {
  *device = ordinal;
  return SUCCESS;
}

int cuDevicePrimaryCtxRetain(uintptr_t* context, int device) {
  *context = 0x100 + device;
  printf("retain %d\n", device);
  return SUCCESS;
}

int cuCtxGetCurrent(uintptr_t* context) {
  *context = current;
  return SUCCESS;
}

int cuCtxSetCurrent(uintptr_t context) {
  current = context;
  printf("enter %lx\n", (long)context);
  return SUCCESS;
}

int cuModuleLoadData(uintptr_t* module, const char* image) {
  if (!current) return INVALID_CONTEXT;
  *module = (modules += 0x1000) | current;
  printf("load %.3s into %lx\n", image + 1, (long)current);
  return SUCCESS;
}

int cuModuleGetFunction(uintptr_t* function, uintptr_t module, const char* name) {
  *function = module;
  printf("function %s\n", name);
  return SUCCESS;
}

int cuFuncSetAttribute(uintptr_t function, int attribute, int value) {
  if ((function & 0xfff) != current) return INVALID_CONTEXT;
  printf("attribute %d = %d\n", attribute, value);
  return SUCCESS;
}

int cuLaunchKernel(uintptr_t function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned threads_y,
                   unsigned threads_z, unsigned shared, uintptr_t stream, void** arguments, void** extra) {
  if ((function & 0xfff) != current) return INVALID_CONTEXT;
  if (!x || !y || !z || y > 65535 || z > 65535 || threads_y != 1 || threads_z != 1 || extra) return INVALID_VALUE;
  printf("launch %ux%ux%u of %u with %u bytes in stream %lx, arguments %d %d\n", x, y, z, threads, shared, (long)stream,
         *(int*)arguments[0], *(int*)arguments[1]);
  return SUCCESS;
}
