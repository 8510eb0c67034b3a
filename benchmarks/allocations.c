// Replaces malloc by one that counts, when it is preloaded (peak_memory.py): the bytes that callers asked for and have
// not freed yet, and their highest number. Each block begins with its size. For glibc, whose own allocator it uses.
#include <errno.h>
#include <stdatomic.h>
#include <stddef.h>
#include <stdint.h>
#include <string.h>

extern void* __libc_malloc(size_t);
extern void __libc_free(void*);

struct head {
  void* base;  // what __libc_malloc returned
  size_t size;
  uintptr_t mark, unused;
};

static const uintptr_t kMark = (uintptr_t)0x9e3779b97f4a7c15u;  // a block that we made has kMark ^ address
static _Atomic long in_use, highest;

long allocations_in_use(void) { return in_use; }
long allocations_highest(void) { return highest; }
void allocations_restart(void) { highest = in_use; }

static struct head* head_of(void* p) { return (struct head*)p - 1; }

void* memalign(size_t align, size_t size) {
  if (align < 16) align = 16;
  if (size > PTRDIFF_MAX - align - sizeof(struct head)) {
    errno = ENOMEM;
    return NULL;
  }
  void* base = __libc_malloc(size + align + sizeof(struct head));
  if (!base) return NULL;
  uintptr_t at = ((uintptr_t)base + sizeof(struct head) + align - 1) / align * align;
  *head_of((void*)at) = (struct head){base, size, kMark ^ at, 0};
  long now = atomic_fetch_add(&in_use, (long)size) + (long)size, before = highest;
  while (now > before && !atomic_compare_exchange_weak(&highest, &before, now)) {
  }
  return (void*)at;
}

void free(void* p) {
  if (!p) return;
  struct head* head = head_of(p);
  if (head->mark != (kMark ^ (uintptr_t)p)) {  // the loader made it
    __libc_free(p);
    return;
  }
  head->mark = 0;
  atomic_fetch_sub(&in_use, (long)head->size);
  __libc_free(head->base);
}

void* malloc(size_t size) { return memalign(16, size); }

void* calloc(size_t count, size_t size) {
  size_t bytes;
  if (__builtin_mul_overflow(count, size, &bytes)) return NULL;
  void* p = malloc(bytes);
  return p ? memset(p, 0, bytes) : NULL;
}

size_t malloc_usable_size(void* p) { return p ? head_of(p)->size : 0; }

void* realloc(void* old, size_t size) {
  void* p = malloc(size);
  if (!p || !old) return p;
  size_t had = malloc_usable_size(old);
  memcpy(p, old, had < size ? had : size);
  free(old);
  return p;
}

void* aligned_alloc(size_t align, size_t size) { return memalign(align, size); }
void* valloc(size_t size) { return memalign(4096, size); }
int posix_memalign(void** out, size_t align, size_t size) {
  void* p = memalign(align, size);
  if (!p) return ENOMEM;
  *out = p;
  return 0;
}
