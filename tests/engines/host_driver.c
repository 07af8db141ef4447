/* A CUDA driver whose device memory is host memory: the entry points that the package calls, with the signatures of
 * cuda.h and the errors of the real driver. What is queued on a stream runs when somebody waits for it and not before,
 * what is captured runs when its graph is launched, and freed memory is overwritten: a missing wait or an address
 * that is no longer valid shows as a wrong answer. It proves our calls through ctypes (argument widths, the current
 * context, what waits for what, who frees what); it proves nothing about a GPU. */
#define _GNU_SOURCE
#include <malloc.h>
#include <pthread.h>
#include <stdlib.h>
#include <string.h>

enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, INVALID_CONTEXT = 201, INVALID_HANDLE = 400 };
enum { CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901, CAPTURE_WRONG_THREAD = 908 };
enum { BIG = 1 << 30, DEPTH = 8, QUEUED = 1024, PINNED = 1024 };

typedef unsigned long long address;
struct stream;

/* One thing that was queued. */
struct work { enum { COPY, DOUBLE, WAIT, GRAPH } kind; void *to; const void *from; size_t size; };
struct event { struct stream *stream; size_t count; };
struct graph { struct work works[QUEUED]; size_t count; };
struct stream { struct work works[QUEUED]; size_t done, count; struct graph *capture; int invalid; };

static pthread_mutex_t lock;
static int initialized, retained, streams, buffers, pinned, events, graphs, executables, depths, launches;
static struct { char *start; size_t size; } pages[PINNED];
static char context;
static struct stream legacy;
static _Thread_local int depth;
static _Thread_local void *stack[DEPTH];
static _Thread_local struct stream *capturing; /* on this thread */
static _Thread_local int mode;                  /* of this thread; 2 is relaxed */

__attribute__((constructor)) static void start(void) {
  pthread_mutexattr_t recursive;
  pthread_mutexattr_init(&recursive);
  pthread_mutexattr_settype(&recursive, PTHREAD_MUTEX_RECURSIVE);
  pthread_mutex_init(&lock, &recursive);
}

static void leave(int *unused) { (void)unused; pthread_mutex_unlock(&lock); }
#define ENTER __attribute__((cleanup(leave))) int entered = pthread_mutex_lock(&lock); (void)entered

static int ready(void) { return depth > 0 && stack[depth - 1] == &context ? OK : INVALID_CONTEXT; }

/* What a test asks: everything still held, and the graphs among it; how many graphs were launched. */
int host_driver_held(void) { ENTER; return retained + streams + buffers + pinned + events + graphs + executables + depths; }
int host_driver_graphs(void) { ENTER; return executables; }
int host_driver_launches(void) { ENTER; return launches; }

int host_driver_is_capturing(void) { return capturing != NULL; }

/* What no thread may do while it captures, in the mode that the package asks for; doing it spoils the capture. */
static int forbidden(void) {
  if (!capturing || mode == 2) return OK;
  capturing->invalid = 1;
  return CAPTURE_UNSUPPORTED;
}

static struct stream *stream_of(void *handle) { return handle == (void *)1 ? &legacy : handle; }

static int run(const struct work *work);

static int drain(struct stream *stream, size_t count) {
  while (stream->done < count) {
    int failure = run(&stream->works[stream->done++ % QUEUED]);
    if (failure) return failure;
  }
  return OK;
}

static int run(const struct work *work) {
  if (work->kind == COPY) memmove(work->to, work->from, work->size);
  if (work->kind == DOUBLE)
    for (size_t i = 0; i < work->size; i++) ((float *)work->to)[i] = 2 * ((const float *)work->from)[i];
  if (work->kind == WAIT) return drain(work->to, work->size);
  if (work->kind == GRAPH) {
    const struct graph *graph = work->from;
    for (size_t i = 0; i < graph->count; i++) run(&graph->works[i]);
  }
  return OK;
}

static int queue(void *on, struct work work) {
  struct stream *stream = stream_of(on);
  if (!stream) return INVALID_HANDLE;
  if (stream->capture) {
    if (stream != capturing) return CAPTURE_WRONG_THREAD;
    if (stream->invalid) return CAPTURE_INVALIDATED;
    stream->capture->works[stream->capture->count++] = work;
  } else {
    if (stream->count - stream->done == QUEUED) return OUT_OF_MEMORY;
    stream->works[stream->count++ % QUEUED] = work;
  }
  return ready();
}

static int is_pinned(const void *start, size_t size) {
  for (int i = 0; i < PINNED; i++)
    if (pages[i].start && pages[i].start <= (const char *)start && (const char *)start + size <= pages[i].start + pages[i].size)
      return 1;
  return 0;
}

int cuInit(unsigned int flags) {
  const char *failure = getenv("HOST_DRIVER_INIT_FAILS");
  if (failure) return atoi(failure);
  initialized = 1;
  return flags == 0 ? OK : INVALID_VALUE;
}

int cuGetErrorName(int error, const char **name) {
  *name = error == 100 ? "CUDA_ERROR_NO_DEVICE"
          : error == INVALID_VALUE ? "CUDA_ERROR_INVALID_VALUE"
          : error == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY"
          : error == INVALID_CONTEXT ? "CUDA_ERROR_INVALID_CONTEXT"
          : error == CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED"
          : error == CAPTURE_INVALIDATED ? "CUDA_ERROR_STREAM_CAPTURE_INVALIDATED" : NULL;
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

int cuDevicePrimaryCtxRetain(void **out, int device) { ENTER; *out = &context; retained++; return device; }

int cuDevicePrimaryCtxRelease_v2(int device) { ENTER; retained--; return device; }

int cuCtxPushCurrent_v2(void *pushed) {
  ENTER;
  if (depth == DEPTH || pushed != &context || !retained) return INVALID_CONTEXT;
  stack[depth++] = pushed;
  depths++;
  return OK;
}

int cuCtxPopCurrent_v2(void **popped) {
  ENTER;
  if (depth == 0) return INVALID_CONTEXT;
  *popped = stack[--depth];
  depths--;
  return OK;
}

int cuMemAlloc_v2(address *out, size_t size) {
  ENTER;
  void *aligned;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  if (size == 0) return INVALID_VALUE;
  if (size > BIG || posix_memalign(&aligned, 256, size)) return OUT_OF_MEMORY;
  memset(aligned, 0xFF, size); /* floats: NaN */
  *out = (address)aligned;
  buffers++;
  return ready();
}

int cuMemFree_v2(address freed) {
  ENTER;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  memset((void *)freed, 0xFF, malloc_usable_size((void *)freed));
  free((void *)freed);
  buffers--;
  return ready();
}

int cuMemAllocHost_v2(void **out, size_t size) {
  ENTER;
  int free_page = 0;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  if (size == 0) return INVALID_VALUE;
  if (size > BIG) return OUT_OF_MEMORY;
  while (pages[free_page].start) free_page++;
  *out = pages[free_page].start = malloc(size);
  pages[free_page].size = size;
  memset(*out, 0xFF, size);
  pinned++;
  return ready();
}

int cuMemFreeHost(void *freed) {
  ENTER;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  for (int i = 0; i < PINNED; i++)
    if (pages[i].start == freed) {
      memset(freed, 0xFF, pages[i].size);
      free(freed);
      pages[i].start = NULL;
      pinned--;
      return ready();
    }
  return INVALID_VALUE;
}

/* A copy from or to memory that is not page-locked cannot be captured. */
static int copy(void *to, const void *from, size_t size, const void *host, void *on) {
  ENTER;
  if (host && capturing && !is_pinned(host, size)) return forbidden();
  return queue(on, (struct work){COPY, to, from, size});
}

int cuMemcpyHtoDAsync_v2(address to, const void *from, size_t size, void *on) { return copy((void *)to, from, size, from, on); }

int cuMemcpyDtoHAsync_v2(void *to, address from, size_t size, void *on) { return copy(to, (const void *)from, size, to, on); }

int cuMemcpyDtoDAsync_v2(address to, address from, size_t size, void *on) {
  return copy((void *)to, (const void *)from, size, NULL, on);
}

int cuMemcpyDtoH_v2(void *to, address from, size_t size) { memcpy(to, (const void *)from, size); return ready(); }

/* Only the ordinal is asked for: small numbers are no memory, and HOST_DRIVER_OTHER_GPU is memory of another GPU. */
int cuPointerGetAttribute(void *data, int attribute, address pointer) {
  const char *other = getenv("HOST_DRIVER_OTHER_GPU");
  if (attribute != 9 || pointer < 4096) return INVALID_VALUE;
  *(int *)data = other && strtoull(other, NULL, 10) == pointer;
  return ready();
}

int cuStreamCreate(void **out, unsigned int flags) {
  ENTER;
  *out = calloc(1, sizeof(struct stream));
  streams++;
  return flags == 1 ? ready() : INVALID_VALUE;
}

int cuStreamDestroy_v2(void *destroyed) {
  ENTER;
  if (!destroyed || destroyed == (void *)1) return INVALID_HANDLE;
  free(destroyed);
  streams--;
  return ready();
}

int cuStreamSynchronize(void *waited) {
  ENTER;
  struct stream *stream = stream_of(waited);
  if (!stream) return INVALID_HANDLE;
  if (forbidden()) return CAPTURE_UNSUPPORTED;
  return ready() ? ready() : drain(stream, stream->count);
}

int cuEventCreate(void **out, unsigned int flags) {
  ENTER;
  *out = calloc(1, sizeof(struct event));
  events++;
  return flags == 2 ? ready() : INVALID_VALUE;
}

int cuEventDestroy_v2(void *destroyed) { ENTER; free(destroyed); events--; return ready(); }

int cuEventRecord(void *recorded, void *on) {
  ENTER;
  struct event *event = recorded;
  if (!event || !stream_of(on)) return INVALID_HANDLE;
  *event = (struct event){stream_of(on), stream_of(on)->count};
  return ready();
}

int cuStreamWaitEvent(void *waiting, void *waited, unsigned int flags) {
  ENTER;
  const struct event *event = waited;
  if (!event || !event->stream || flags) return INVALID_HANDLE;
  return queue(waiting, (struct work){WAIT, event->stream, NULL, event->count});
}

int cuThreadExchangeStreamCaptureMode(int *exchanged) {
  int before = mode;
  mode = *exchanged;
  *exchanged = before;
  return ready();
}

int cuStreamBeginCapture_v2(void *on, int capture_mode) {
  ENTER;
  struct stream *stream = on;
  if (capture_mode != 1 || !stream || stream == (void *)1 || stream->capture || capturing) return INVALID_VALUE;
  stream->capture = calloc(1, sizeof(struct graph));
  stream->invalid = 0;
  capturing = stream;
  return ready();
}

int cuStreamEndCapture(void *on, void **out) {
  ENTER;
  struct stream *stream = on;
  if (stream != capturing) return CAPTURE_WRONG_THREAD;
  capturing = NULL;
  *out = stream->invalid ? NULL : stream->capture;
  if (stream->invalid) free(stream->capture);
  else graphs++;
  stream->capture = NULL;
  return stream->invalid ? CAPTURE_INVALIDATED : ready();
}

int cuGraphDestroy(void *destroyed) { ENTER; free(destroyed); graphs--; return ready(); }

int cuGraphInstantiateWithFlags(void **out, void *captured, unsigned long long flags) {
  ENTER;
  if (!captured || flags) return INVALID_VALUE;
  *out = malloc(sizeof(struct graph));
  *(struct graph *)*out = *(struct graph *)captured;
  executables++;
  return ready();
}

int cuGraphLaunch(void *launched, void *on) {
  ENTER;
  launches++;
  return launched ? queue(on, (struct work){GRAPH, NULL, launched, 0}) : INVALID_VALUE;
}

int cuGraphExecDestroy(void *destroyed) {
  ENTER;
  memset(destroyed, 0, sizeof(struct graph));
  free(destroyed);
  executables--;
  return ready();
}

/* The kernel of the stand-in TensorRT and of tests that queue work on streams of their own. */
int host_driver_double(address to, address from, size_t count, void *on) {
  ENTER;
  return queue(on, (struct work){DOUBLE, (void *)to, (const void *)from, count});
}
