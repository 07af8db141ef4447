/* An NVML whose one GPU the environment describes: the entry points that export/gpu_state.py calls, with the signatures
 * and the errors of nvml.h. It proves our calls through ctypes (argument widths, who fills what, what a driver may leave
 * out); it proves nothing about a GPU. */
#include <stdlib.h>
#include <string.h>

enum { OK = 0, UNINITIALIZED = 1, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

struct violation_time { unsigned long long reference_us, violation_ns; };

static int initialized;
static char gpu;

static int number(const char *name, unsigned int *value) {
  const char *text = getenv(name);
  if (!text) return NOT_SUPPORTED;
  *value = (unsigned int)strtoul(text, NULL, 0);
  return OK;
}

int nvmlInit_v2(void) {
  initialized = !getenv("HOST_NVML_FAILS");
  return initialized ? OK : UNINITIALIZED;
}

int nvmlDeviceGetHandleByPciBusId_v2(const char *bus_id, void **device) {
  if (!initialized) return UNINITIALIZED;
  *device = &gpu;
  return strcmp(bus_id, "00000000:0A:00.0") == 0 ? OK : NOT_FOUND;
}

int nvmlDeviceGetCurrentClocksThrottleReasons(void *device, unsigned long long *reasons) {
  unsigned int bits = 0;
  int code = number("HOST_NVML_REASONS", &bits);
  *reasons = 0xABCD000000000000ull | bits; /* bits that nobody knows yet */
  return device == &gpu ? code : INVALID_ARGUMENT;
}

int nvmlDeviceGetViolationStatus(void *device, int policy, struct violation_time *spent) {
  const char *names[] = {"HOST_NVML_POWER_MS", "HOST_NVML_THERMAL_MS", NULL, "HOST_NVML_BOARD_MS"};
  unsigned int milliseconds = 0;
  if (device != &gpu || policy < 0 || policy > 3 || !names[policy]) return INVALID_ARGUMENT;
  int code = number(names[policy], &milliseconds);
  spent->reference_us = 1;
  spent->violation_ns = milliseconds * 1000000ull;
  return code;
}

int nvmlDeviceGetClockInfo(void *device, int type, unsigned int *clock) {
  return device == &gpu && type == 1 ? number("HOST_NVML_CLOCK", clock) : INVALID_ARGUMENT;
}

int nvmlDeviceGetMaxClockInfo(void *device, int type, unsigned int *clock) {
  return device == &gpu && type == 1 ? number("HOST_NVML_MAX_CLOCK", clock) : INVALID_ARGUMENT;
}

int nvmlDeviceGetTemperature(void *device, int sensor, unsigned int *celsius) {
  return device == &gpu && sensor == 0 ? number("HOST_NVML_CELSIUS", celsius) : INVALID_ARGUMENT;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned int *count, void *list) {
  if (device != &gpu || *count != 0 || list) return INVALID_ARGUMENT;
  int code = number("HOST_NVML_PROCESSES", count);
  return code != OK ? code : *count ? INSUFFICIENT_SIZE : OK;
}

#ifndef OLD /* a driver that has not heard of it */
int nvmlDeviceGetMigMode(void *device, unsigned int *current, unsigned int *pending) {
  *pending = 0;
  return device == &gpu ? number("HOST_NVML_MIG", current) : INVALID_ARGUMENT;
}
#endif
