/* A fake CUDA driver for machines without a GPU. It has the functions that loraserve.transfer calls.

It is compiled against NVIDIA's cuda.h, so functions, structures and constants are those of the real driver. The memory
of a GPU is a memfd, which other processes map through /proc. The fake is strict where a real driver fails or has
undefined behaviour: the processor cannot access its addresses, no call works without a current context, a copy runs
when its stream is synchronised and never leaves its allocation, and a process cannot open what it exported itself.

Tests with this driver do not show how a real driver behaves. scripts/gpu_check measures that: the duration of calls,
copies from a dead owner, peer access, hidden devices, and the registration of a dma-buf with a real device.

Settings are environment variables, with their defaults in parentheses:
FAKE_CUDA_DEVICES (1)    number of GPUs
FAKE_CUDA_FIRST (0)      index of the first visible GPU
FAKE_CUDA_REACH (1)      0: GPUs cannot access each other's memory
FAKE_CUDA_IPC (1)        0: memory cannot be exported
FAKE_CUDA_BYTES          bytes of memory of each GPU
FAKE_CUDA_COPY_US (0)    duration of a stream's copies in microseconds */

#define _GNU_SOURCE
#include <cuda.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/syscall.h>
#include <fcntl.h>
#include <unistd.h>

#define MOST 256
#define GPUS 8
#define DEPTH 8
#define MAGIC 0x4c6f5241u

struct CUctx_st { int device; };
struct copy { void *to; const void *from; size_t length; };
struct CUstream_st { struct copy waiting[MOST]; int count; };
struct memory { char *address, *bytes; size_t size; int descriptor, device, opened; uint64_t from; };
struct exported { uint32_t magic; int32_t pid, descriptor, gpu; uint64_t size, nonce; };

static struct CUctx_st contexts[GPUS];
static struct memory all[MOST];
static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static __thread CUcontext stack[DEPTH];
static __thread int depth;
static int started;

static long setting(const char *name, long otherwise) {
    const char *text = getenv(name);
    return text ? atol(text) : otherwise;
}

static CUresult no_context(void) {
    if (!started) return CUDA_ERROR_NOT_INITIALIZED;
    return depth ? CUDA_SUCCESS : CUDA_ERROR_INVALID_CONTEXT;
}
#define NEEDS_CONTEXT do { CUresult missing = no_context(); if (missing) return missing; } while (0)
#define NEEDS_DEVICE(n) do { if ((n) < 0 || (n) >= setting("FAKE_CUDA_DEVICES", 1)) return CUDA_ERROR_INVALID_DEVICE; } while (0)

CUresult cuInit(unsigned int flags) {
    if (flags) return CUDA_ERROR_INVALID_VALUE;
    if (setting("FAKE_CUDA_DEVICES", 1) == 0) return CUDA_ERROR_NO_DEVICE;
    started = 1;
    return CUDA_SUCCESS;
}

CUresult cuGetErrorName(CUresult error, const char **name) {
#define NAMED(which) case which: *name = #which; return CUDA_SUCCESS
    switch (error) {
        NAMED(CUDA_SUCCESS);
        NAMED(CUDA_ERROR_INVALID_VALUE);
        NAMED(CUDA_ERROR_OUT_OF_MEMORY);
        NAMED(CUDA_ERROR_NOT_INITIALIZED);
        NAMED(CUDA_ERROR_NO_DEVICE);
        NAMED(CUDA_ERROR_INVALID_DEVICE);
        NAMED(CUDA_ERROR_INVALID_CONTEXT);
        NAMED(CUDA_ERROR_INVALID_HANDLE);
        NAMED(CUDA_ERROR_MAP_FAILED);
        NAMED(CUDA_ERROR_PEER_ACCESS_UNSUPPORTED);
        NAMED(CUDA_ERROR_NOT_SUPPORTED);
        default: *name = NULL; return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuDeviceGetCount(int *count) {
    *count = (int)setting("FAKE_CUDA_DEVICES", 1);
    return started ? CUDA_SUCCESS : CUDA_ERROR_NOT_INITIALIZED;
}

CUresult cuDeviceGet(CUdevice *device, int ordinal) {
    NEEDS_DEVICE(ordinal);
    *device = ordinal;
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetName(char *name, int length, CUdevice device) {
    NEEDS_DEVICE(device);
    snprintf(name, (size_t)length, "software GPU %ld", device + setting("FAKE_CUDA_FIRST", 0));
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetUuid(CUuuid *uuid, CUdevice device) {
    NEEDS_DEVICE(device);
    memset(uuid->bytes, 0, sizeof uuid->bytes);
    uuid->bytes[15] = (char)(1 + device + setting("FAKE_CUDA_FIRST", 0));
    return CUDA_SUCCESS;
}

CUresult cuDeviceGetAttribute(int *value, CUdevice_attribute attribute, CUdevice device) {
    NEEDS_DEVICE(device);
    switch (attribute) {
        case CU_DEVICE_ATTRIBUTE_DMA_BUF_SUPPORTED: *value = 1; return CUDA_SUCCESS;
        case CU_DEVICE_ATTRIBUTE_GPU_DIRECT_RDMA_WRITES_ORDERING: *value = 0; return CUDA_SUCCESS;
        default: return CUDA_ERROR_INVALID_VALUE;
    }
}

CUresult cuDeviceCanAccessPeer(int *can, CUdevice device, CUdevice other) {
    NEEDS_DEVICE(device);
    NEEDS_DEVICE(other);
    *can = device != other && setting("FAKE_CUDA_REACH", 1);
    return CUDA_SUCCESS;
}

CUresult cuDevicePrimaryCtxRetain(CUcontext *context, CUdevice device) {
    NEEDS_DEVICE(device);
    contexts[device].device = device;
    *context = &contexts[device];
    return CUDA_SUCCESS;
}

CUresult cuCtxPushCurrent(CUcontext context) {
    if (context < contexts || context >= contexts + GPUS || depth == DEPTH) return CUDA_ERROR_INVALID_CONTEXT;
    stack[depth++] = context;
    return CUDA_SUCCESS;
}

CUresult cuCtxPopCurrent(CUcontext *context) {
    NEEDS_CONTEXT;
    *context = stack[--depth];
    return CUDA_SUCCESS;
}

static int device(void) { return stack[depth - 1]->device; }

static struct memory *found(CUdeviceptr at, size_t length) {
    char *address = (char *)(uintptr_t)at;
    for (struct memory *each = all; each < all + MOST; each++)
        if (each->address && address >= each->address && address + length <= each->address + each->size) return each;
    return NULL;
}

static CUresult mapped(struct memory wanted, CUdeviceptr *at) {
    for (struct memory *each = all; each < all + MOST; each++) {
        if (each->address) continue;
        wanted.address = mmap(NULL, wanted.size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
        wanted.bytes = mmap(NULL, wanted.size, PROT_READ | PROT_WRITE, MAP_SHARED, wanted.descriptor, 0);
        if (wanted.address == MAP_FAILED || wanted.bytes == MAP_FAILED) return CUDA_ERROR_MAP_FAILED;
        *each = wanted;
        *at = (CUdeviceptr)(uintptr_t)wanted.address;
        return CUDA_SUCCESS;
    }
    return CUDA_ERROR_OUT_OF_MEMORY;
}

static void unmapped(struct memory *each) {
    munmap(each->address, each->size);
    munmap(each->bytes, each->size);
    close(each->descriptor);
    memset(each, 0, sizeof *each);
}

CUresult cuMemAlloc(CUdeviceptr *at, size_t size) {
    NEEDS_CONTEXT;
    if (!size) return CUDA_ERROR_INVALID_VALUE;
    pthread_mutex_lock(&lock);
    size_t taken = 0;
    for (int i = 0; i < MOST; i++) taken += all[i].address && !all[i].opened && all[i].device == device() ? all[i].size : 0;
    CUresult result = CUDA_ERROR_OUT_OF_MEMORY;
    if (size <= (size_t)setting("FAKE_CUDA_BYTES", 1L << 30) - taken) {
        struct memory wanted = {.size = size, .device = device()};
        wanted.descriptor = (int)syscall(SYS_memfd_create, "software-gpu", 1);
        result = ftruncate(wanted.descriptor, (off_t)size) ? CUDA_ERROR_OUT_OF_MEMORY : mapped(wanted, at);
    }
    pthread_mutex_unlock(&lock);
    return result;
}

static CUresult released(CUdeviceptr at, int opened) {
    NEEDS_CONTEXT;
    pthread_mutex_lock(&lock);
    struct memory *each = found(at, 1);
    int mine = each && (uintptr_t)each->address == at && each->opened == opened;
    if (mine) unmapped(each);
    pthread_mutex_unlock(&lock);
    return mine ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemFree(CUdeviceptr at) { return released(at, 0); }
CUresult cuIpcCloseMemHandle(CUdeviceptr at) { return released(at, 1); }

CUresult cuMemGetAddressRange(CUdeviceptr *base, size_t *size, CUdeviceptr at) {
    NEEDS_CONTEXT;
    struct memory *each = found(at, 1);
    if (!each) return CUDA_ERROR_INVALID_VALUE;
    *base = (CUdeviceptr)(uintptr_t)each->address;
    *size = each->size;
    return CUDA_SUCCESS;
}

CUresult cuMemGetHandleForAddressRange(void *handle, CUdeviceptr at, size_t size, CUmemRangeHandleType type,
                                       unsigned long long flags) {
    NEEDS_CONTEXT;
    size_t page = (size_t)sysconf(_SC_PAGESIZE);
    struct memory *each = found(at, size);
    if (!each || at % page || size % page || flags || type != CU_MEM_RANGE_HANDLE_TYPE_DMA_BUF_FD)
        return CUDA_ERROR_INVALID_VALUE;
    *(int *)handle = dup(each->descriptor);
    return CUDA_SUCCESS;
}

CUresult cuFlushGPUDirectRDMAWrites(CUflushGPUDirectRDMAWritesTarget target, CUflushGPUDirectRDMAWritesScope scope) {
    NEEDS_CONTEXT;
    int known = target == CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TARGET_CURRENT_CTX &&
                scope == CU_FLUSH_GPU_DIRECT_RDMA_WRITES_TO_OWNER;
    return known ? CUDA_SUCCESS : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuIpcGetMemHandle(CUipcMemHandle *handle, CUdeviceptr at) {
    NEEDS_CONTEXT;
    struct memory *each = found(at, 1);
    if (!setting("FAKE_CUDA_IPC", 1)) return CUDA_ERROR_NOT_SUPPORTED;
    if (!each || each->opened || (uintptr_t)each->address != at) return CUDA_ERROR_INVALID_VALUE;
    struct exported out = {MAGIC, getpid(), each->descriptor, each->device + (int)setting("FAKE_CUDA_FIRST", 0),
                           each->size, 0};
    memset(handle, 0, sizeof *handle);
    memcpy(handle->reserved, &out, sizeof out);
    return CUDA_SUCCESS;
}

CUresult cuIpcOpenMemHandle(CUdeviceptr *at, CUipcMemHandle handle, unsigned int flags) {
    NEEDS_CONTEXT;
    struct exported in;
    char path[64];
    memcpy(&in, handle.reserved, sizeof in);
    if (in.magic != MAGIC || flags != CU_IPC_MEM_LAZY_ENABLE_PEER_ACCESS) return CUDA_ERROR_INVALID_VALUE;
    if (in.pid == getpid()) return CUDA_ERROR_INVALID_CONTEXT;
    long gpu = in.gpu - setting("FAKE_CUDA_FIRST", 0);
    if (gpu < 0 || gpu >= setting("FAKE_CUDA_DEVICES", 1)) return CUDA_ERROR_INVALID_DEVICE;
    if (gpu != device() && !setting("FAKE_CUDA_REACH", 1)) return CUDA_ERROR_PEER_ACCESS_UNSUPPORTED;
    snprintf(path, sizeof path, "/proc/%d/fd/%d", in.pid, in.descriptor);
    struct memory wanted = {.size = in.size, .device = (int)gpu, .opened = 1};
    wanted.descriptor = open(path, O_RDWR | O_CLOEXEC);
    if (wanted.descriptor < 0) return CUDA_ERROR_INVALID_HANDLE;
    pthread_mutex_lock(&lock);
    CUresult result = mapped(wanted, at);
    pthread_mutex_unlock(&lock);
    return result;
}

static void *place(CUdeviceptr at, size_t length) {
    struct memory *each = found(at, length);
    return each ? each->bytes + ((char *)(uintptr_t)at - each->address) : NULL;
}

static CUresult later(CUstream stream, void *to, const void *from, size_t length) {
    NEEDS_CONTEXT;
    if (!to || !from || !stream || stream->count == MOST) return CUDA_ERROR_INVALID_VALUE;
    stream->waiting[stream->count++] = (struct copy){to, from, length};
    return CUDA_SUCCESS;
}

CUresult cuMemcpyDtoDAsync(CUdeviceptr to, CUdeviceptr from, size_t length, CUstream stream) {
    return later(stream, place(to, length), place(from, length), length);
}

CUresult cuMemcpyDtoHAsync(void *to, CUdeviceptr from, size_t length, CUstream stream) {
    return later(stream, to, place(from, length), length);
}

CUresult cuMemcpyDtoH(void *to, CUdeviceptr from, size_t length) {
    NEEDS_CONTEXT;
    const void *source = place(from, length);
    return source ? (memcpy(to, source, length), CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuMemcpyHtoD(CUdeviceptr to, const void *from, size_t length) {
    NEEDS_CONTEXT;
    void *target = place(to, length);
    return target ? (memcpy(target, from, length), CUDA_SUCCESS) : CUDA_ERROR_INVALID_VALUE;
}

CUresult cuStreamCreate(CUstream *stream, unsigned int flags) {
    NEEDS_CONTEXT;
    if (flags != CU_STREAM_NON_BLOCKING) return CUDA_ERROR_INVALID_VALUE;
    *stream = calloc(1, sizeof **stream);
    return CUDA_SUCCESS;
}

CUresult cuStreamSynchronize(CUstream stream) {
    NEEDS_CONTEXT;
    usleep((useconds_t)setting("FAKE_CUDA_COPY_US", 0));
    for (int i = 0; i < stream->count; i++)
        memcpy(stream->waiting[i].to, stream->waiting[i].from, stream->waiting[i].length);
    stream->count = 0;
    return CUDA_SUCCESS;
}

CUresult cuStreamDestroy(CUstream stream) {
    NEEDS_CONTEXT;
    free(stream);
    return CUDA_SUCCESS;
}
