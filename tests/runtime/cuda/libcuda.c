/* A double of the NVIDIA driver: device memory is host memory, streams run at once, captures are replayed on launch.
 *
 * Every call is written to a log that a test reads; any call can be told to fail. What a real driver refuses is refused:
 * a call without a current context, a freed or foreign handle, a copy outside of an allocation, a wait inside a capture.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <pthread.h>
#include <time.h>

typedef int R;
enum { OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, INVALID_CONTEXT = 201, INVALID_HANDLE = 400, NOT_FOUND = 500,
       ILLEGAL_ADDRESS = 700, CAPTURE_UNSUPPORTED = 900, CAPTURE_INVALIDATED = 901 };
#ifndef COUNT
#define COUNT 1
#endif
#ifndef INIT
#define INIT 0
#endif
#ifndef MEMORY_STATUS
#define MEMORY_STATUS 0
#endif

/* ---- the log, failures on demand, live objects ---- */
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static char journal[1 << 20];
static size_t written;
static struct { char name[48]; int code, skip; } failing[16];
static __thread int depth;

static void note(const char *format, ...) {
    va_list arguments;
    va_start(arguments, format);
    pthread_mutex_lock(&lock);
    if (written < sizeof journal - 256) {
        written += vsnprintf(journal + written, 250, format, arguments);
        journal[written++] = '\n';
        journal[written] = 0;
    }
    pthread_mutex_unlock(&lock);
    va_end(arguments);
}
static R told_to_fail(const char *name) {
    for (int i = 0; i < 16; i++)
        if (failing[i].code && !strcmp(failing[i].name, name)) {
            if (failing[i].skip-- > 0) return OK;
            failing[i].skip = 0;
            note("%s failed", name);
            return failing[i].code;
        }
    return OK;
}
const char *double_log(void) { return journal; }
void double_clear(void) { pthread_mutex_lock(&lock); written = 0; journal[0] = 0; pthread_mutex_unlock(&lock); }
void double_fail(const char *name, int code, int skip) {
    for (int i = 0; i < 16; i++)
        if (!failing[i].code || !strcmp(failing[i].name, name)) {
            snprintf(failing[i].name, 48, "%s", name); failing[i].code = code; failing[i].skip = skip; return;
        }
}
void double_heal(void) { memset(failing, 0, sizeof failing); }

enum { DEVICE = 1, HOST, STREAM, EVENT, GRAPH, EXECUTABLE, KINDS };
typedef struct Object { int kind; size_t size; void *memory; double at; struct Op *ops; int capturing, broken, flags;
                        struct Object *next; } Object;
typedef struct Op { void (*call)(void *); void *argument; void *target; const void *source; size_t size; struct Op *next; } Op;
static Object *alive;
static size_t used;
static const size_t TOTAL = (size_t)1 << 30;

static Object *make(int kind) {
    Object *object = calloc(1, sizeof *object);
    object->kind = kind;
    pthread_mutex_lock(&lock);
    object->next = alive; alive = object;
    pthread_mutex_unlock(&lock);
    return object;
}
static Object *find(const void *handle, int kind) {
    pthread_mutex_lock(&lock);
    Object *object = alive;
    while (object && !(object->kind == kind && (object == handle || (kind <= HOST && object->memory == handle)))) object = object->next;
    pthread_mutex_unlock(&lock);
    return object;
}
static int inside(const void *from, size_t size) {
    int found = 0;
    pthread_mutex_lock(&lock);
    for (Object *o = alive; o && !found; o = o->next)
        found = o->kind <= HOST && (char *)from >= (char *)o->memory && (char *)from + size <= (char *)o->memory + o->size;
    pthread_mutex_unlock(&lock);
    return found;
}
static R drop(void *handle, int kind) {
    Object *object = find(handle, kind);
    if (!object) return kind <= HOST ? INVALID_VALUE : INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    for (Object **place = &alive; *place; place = &(*place)->next)
        if (*place == object) { *place = object->next; break; }
    if (kind <= HOST) used -= object->size;
    pthread_mutex_unlock(&lock);
    free(object->memory);
    free(object);
    return OK;
}
int double_alive(int kind) {
    int count = 0;
    for (Object *o = alive; o; o = o->next) count += o->kind == kind;
    return count;
}
#define BEGIN(name) R status = told_to_fail(#name); if (status) return status; if (depth < 1) return INVALID_CONTEXT;

/* ---- the device ---- */
R cuInit(unsigned flags) { return INIT; }
R cuDriverGetVersion(int *version) { *version = 13000; return OK; }
R cuDeviceGetCount(int *count) { *count = COUNT; return OK; }
R cuDeviceGet(int *device, int index) { *device = index; return index < COUNT ? OK : 101; }
R cuDeviceGetName(char *name, int size, int device) { snprintf(name, size, "Test GPU"); return OK; }
R cuDeviceGetAttribute(int *value, int attribute, int device) {
    *value = attribute == 75 ? 8 : attribute == 76 ? 9 : 1;
    return OK;
}
R cuDeviceTotalMem_v2(size_t *bytes, int device) { *bytes = TOTAL; return MEMORY_STATUS; }
R cuDeviceGetUuid_v2(unsigned char *uuid, int device) { for (int i = 0; i < 16; i++) uuid[i] = device * 16 + i; return OK; }
R cuGetErrorName(int code, const char **name) {
    *name = code == OUT_OF_MEMORY ? "CUDA_ERROR_OUT_OF_MEMORY" : code == ILLEGAL_ADDRESS ? "CUDA_ERROR_ILLEGAL_ADDRESS"
          : code == CAPTURE_UNSUPPORTED ? "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED" : "CUDA_ERROR_UNKNOWN";
    return OK;
}
R cuGetErrorString(int code, const char **text) {
    *text = code == OUT_OF_MEMORY ? "out of memory" : code == ILLEGAL_ADDRESS ? "an illegal memory access was encountered"
          : code == CAPTURE_UNSUPPORTED ? "operation not permitted when stream is capturing" : "unknown error";
    return OK;
}

/* ---- contexts ---- */
static int retained[8];
R cuDevicePrimaryCtxRetain(void **context, int device) { note("retain %d", device); retained[device]++; *context = &retained[device]; return OK; }
R cuDevicePrimaryCtxRelease_v2(int device) { note("release %d", device); retained[device]--; return OK; }
R cuCtxPushCurrent_v2(void *context) { R s = told_to_fail("cuCtxPushCurrent"); if (s) return s; depth++; return OK; }
R cuCtxPopCurrent_v2(void **context) { if (depth < 1) return INVALID_CONTEXT; depth--; if (context) *context = &retained[0]; return OK; }
R cuCtxGetCurrent(void **context) { *context = depth ? &retained[0] : NULL; return OK; }
R cuCtxSynchronize(void) { return told_to_fail("cuCtxSynchronize"); }
R cuMemGetInfo_v2(size_t *available, size_t *total) { BEGIN(cuMemGetInfo); *available = TOTAL - used; *total = TOTAL; return OK; }

/* ---- memory ---- */
static R allocate(int kind, size_t size, void **memory) {
    if (!size) return INVALID_VALUE;
    if (used + size > TOTAL) return OUT_OF_MEMORY;
    Object *object = make(kind);
    object->memory = calloc(1, size); object->size = size; used += size;
    *memory = object->memory;
    return OK;
}
R cuMemAlloc_v2(uintptr_t *pointer, size_t size) { BEGIN(cuMemAlloc); note("allocate %zu", size); return allocate(DEVICE, size, (void **)pointer); }
R cuMemFree_v2(uintptr_t pointer) { BEGIN(cuMemFree); note("free"); return drop((void *)pointer, DEVICE); }
R cuMemHostAlloc(void **pointer, size_t size, unsigned flags) { BEGIN(cuMemHostAlloc); note("page-locked %zu", size); return allocate(HOST, size, pointer); }
R cuMemFreeHost(void *pointer) { BEGIN(cuMemFreeHost); note("free page-locked"); return drop(pointer, HOST); }

static R submit(void *stream, Op op) {
    Object *object = find(stream, STREAM);
    if (!object) return INVALID_HANDLE;
    if (!object->capturing) {
        if (op.call) op.call(op.argument); else if (op.size) memcpy(op.target, op.source, op.size);
        return OK;
    }
    Op **last = &object->ops, *copy = malloc(sizeof op);
    while (*last) last = &(*last)->next;
    *copy = op; copy->next = NULL; *last = copy;
    return OK;
}
R cuMemcpyHtoDAsync_v2(uintptr_t target, const void *source, size_t size, void *stream) {
    BEGIN(cuMemcpyHtoDAsync);
    note("upload %zu on %p", size, stream);
    if (!find(stream, STREAM)) return INVALID_HANDLE;
    if (!inside((void *)target, size) || !inside(source, size)) return INVALID_VALUE;
    return submit(stream, (Op){.target = (void *)target, .source = source, .size = size});
}
R cuMemcpyDtoHAsync_v2(void *target, uintptr_t source, size_t size, void *stream) {
    BEGIN(cuMemcpyDtoHAsync);
    note("download %zu on %p", size, stream);
    if (!find(stream, STREAM)) return INVALID_HANDLE;
    if (!inside(target, size) || !inside((void *)source, size)) return INVALID_VALUE;
    return submit(stream, (Op){.target = target, .source = (void *)source, .size = size});
}
/* What a kernel would be: `call` runs on the stream, at once or at each launch of the graph that recorded it. */
R double_kernel(void (*call)(void *), void *argument, void *stream) {
    if (depth < 1) return INVALID_CONTEXT;
    note("kernel on %p", stream);
    return submit(stream, (Op){.call = call, .argument = argument});
}

/* ---- streams and events ---- */
R cuStreamCreate(void **stream, unsigned flags) {
    BEGIN(cuStreamCreate);
    Object *object = make(STREAM);
    object->flags = flags; *stream = object;
    note("stream %p %s", (void *)object, flags == 1 ? "non-blocking" : "blocking");
    return OK;
}
R cuStreamDestroy_v2(void *stream) { BEGIN(cuStreamDestroy); note("stream closed"); return drop(stream, STREAM); }
R cuStreamSynchronize(void *stream) {
    BEGIN(cuStreamSynchronize);
    Object *object = find(stream, STREAM);
    if (!object) return INVALID_HANDLE;
    if (object->capturing) { object->broken = 1; return CAPTURE_UNSUPPORTED; }
    note("synchronize %p", stream);
    return OK;
}
R cuStreamWaitEvent(void *stream, void *event, unsigned flags) {
    BEGIN(cuStreamWaitEvent);
    note("wait on %p", stream);
    return find(stream, STREAM) && find(event, EVENT) ? OK : INVALID_HANDLE;
}
static double now(void) { struct timespec t; clock_gettime(CLOCK_MONOTONIC, &t); return t.tv_sec * 1e3 + t.tv_nsec / 1e6; }
R cuEventCreate(void **event, unsigned flags) {
    BEGIN(cuEventCreate);
    *event = make(EVENT);
    note("event %s", flags & 1 ? "blocking" : "spinning");
    return OK;
}
R cuEventDestroy_v2(void *event) { BEGIN(cuEventDestroy); return drop(event, EVENT); }
R cuEventRecord(void *event, void *stream) {
    BEGIN(cuEventRecord);
    Object *object = find(event, EVENT);
    if (!object || !find(stream, STREAM)) return INVALID_HANDLE;
    object->at = now();
    note("record on %p", stream);
    return OK;
}
R cuEventSynchronize(void *event) { BEGIN(cuEventSynchronize); note("event synchronize"); return find(event, EVENT) ? OK : INVALID_HANDLE; }
R cuEventElapsedTime(float *ms, void *start, void *end) {
    BEGIN(cuEventElapsedTime);
    Object *first = find(start, EVENT), *last = find(end, EVENT);
    if (!first || !last || !first->at || !last->at) return INVALID_HANDLE;
    *ms = (float)(last->at - first->at);
    return OK;
}
R cuEventElapsedTime_v2(float *ms, void *start, void *end) { return cuEventElapsedTime(ms, start, end); }

/* ---- the one kernel that is known here: tests/gpu/proof/standin_engine.py's `stand_in` ---- */
typedef struct { const float *x; float *y; int count, rounds; } Launch;
static void stand_in(void *argument) {
    Launch *launch = argument;
    for (int i = 0; i < launch->count; i++) {
        float value = launch->x[i];
        for (int k = 0; k < launch->rounds; k++) value = 0.5f * value + 1.0f;
        launch->y[i] = value;
    }
}
R cuModuleLoadData(void **module, const void *image) { BEGIN(cuModuleLoadData); *module = (void *)image; return OK; }
R cuModuleGetFunction(void **function, void *module, const char *name) {
    BEGIN(cuModuleGetFunction);
    *function = strcmp(name, "stand_in") ? NULL : (void *)stand_in;
    return *function ? OK : NOT_FOUND;
}
R cuLaunchKernel(void *function, unsigned x, unsigned y, unsigned z, unsigned threads, unsigned by, unsigned bz,
                 unsigned shared, void *stream, void **parameters, void **extra) {
    BEGIN(cuLaunchKernel);
    Launch *launch = malloc(sizeof *launch); /* kept: a graph may launch it again */
    *launch = (Launch){*(const float **)parameters[0], *(float **)parameters[1], *(int *)parameters[2], *(int *)parameters[3]};
    size_t size = sizeof(float) * launch->count;
    if (function != (void *)stand_in || (size_t)x * threads < (size_t)launch->count) return INVALID_VALUE;
    if (!inside(launch->x, size) || !inside(launch->y, size)) return ILLEGAL_ADDRESS;
    note("kernel on %p", stream);
    return submit(stream, (Op){.call = stand_in, .argument = launch});
}
R cuMemcpyHtoD_v2(uintptr_t target, const void *source, size_t size) {
    BEGIN(cuMemcpyHtoD);
    if (!inside((void *)target, size)) return INVALID_VALUE;
    memcpy((void *)target, source, size);
    return OK;
}

/* ---- graphs ---- */
R cuStreamBeginCapture_v2(void *stream, int mode) {
    BEGIN(cuStreamBeginCapture);
    Object *object = find(stream, STREAM);
    if (!object || object->capturing) return INVALID_HANDLE;
    note("capture %p mode %d", stream, mode);
    object->capturing = 1; object->broken = 0; object->ops = NULL;
    return OK;
}
R cuStreamEndCapture(void *stream, void **graph) {
    *graph = NULL;
    Object *object = find(stream, STREAM);
    if (object) object->capturing = 0;
    note("capture ended");
    BEGIN(cuStreamEndCapture);
    if (!object) return INVALID_HANDLE;
    if (object->broken) return CAPTURE_INVALIDATED;
    Object *made = make(GRAPH);
    made->ops = object->ops; object->ops = NULL; *graph = made;
    return OK;
}
R cuGraphInstantiateWithFlags(void **executable, void *graph, unsigned long long flags) {
    BEGIN(cuGraphInstantiate);
    Object *from = find(graph, GRAPH), *made;
    if (!from) return INVALID_HANDLE;
    made = make(EXECUTABLE); made->ops = from->ops; *executable = made;
    return OK;
}
R cuGraphLaunch(void *executable, void *stream) {
    BEGIN(cuGraphLaunch);
    Object *object = find(executable, EXECUTABLE);
    if (!object || !find(stream, STREAM)) return INVALID_HANDLE;
    note("launch on %p", stream);
    for (Op *op = object->ops; op; op = op->next) submit(stream, *op);
    return OK;
}
R cuGraphDestroy(void *graph) { BEGIN(cuGraphDestroy); return drop(graph, GRAPH); }
R cuGraphExecDestroy(void *executable) { BEGIN(cuGraphExecDestroy); note("graph closed"); return drop(executable, EXECUTABLE); }

/* ---- how cuda-bindings finds all of this: by name, without the suffix of the version ---- */
R cuGetProcAddress_v2(const char *symbol, void **function, int version, uint64_t flags, int *status) {
    const char *suffixes[] = {"_v2", "WithFlags", ""};
    void *self = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    char name[96];
    *function = NULL;
    for (int i = 0; i < 3 && !*function; i++) {
        snprintf(name, sizeof name, "%s%s", symbol, suffixes[i]);
        *function = dlsym(self, name);
    }
    if (status) *status = *function ? 0 : 1;
    return *function ? OK : NOT_FOUND;
}
