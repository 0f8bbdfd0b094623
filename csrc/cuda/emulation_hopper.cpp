// What sm_90a does in the background, for tests: things happen as late as they may, and what must not be touched meanwhile is looked at.
//
// A tile that is copied arrives when nobody else has anything to do (with reversed threads at once); until then its place is full of 0xff. A product is
// computed when it starts, but its result lies hidden until it has been waited for. From its start on its operands, in registers and in shared memory,
// must stay as they are, and the sums that it writes to are NaN and must stay that. What a fence must stand between is compared with how it was at the
// last fence. A thread that makes a barrier or arrives at one lets others go first, so that what it should have done before shows.
#include "hopper.h"

#include "../common/macros.h"

#include <array>
#include <map>
#include <vector>

namespace bnb {
namespace emulation {
namespace {

constexpr uint32_t kFirstAddress = 1024; // of dynamic shared memory
constexpr uint32_t kUntouched = 0x7fbadbadu;
constexpr int kMostColumns = 256;

// ------------------------------------------------------------------------------------------------------------------------- shared memory
unsigned char* shared_place(uint32_t address, size_t bytes) {
    if (address < kFirstAddress || address + bytes > kFirstAddress + dynamic_shared_bytes())
        fail("%zu bytes at address %u: not in dynamic shared memory", bytes, address);
    return static_cast<unsigned char*>(dynamic_shared_storage()) + (address - kFirstAddress);
}

// Bits 4.. of an address, as many as the swizzle has, are joined with those from bit 7 on.
uint32_t swizzled(uint32_t address, int bits) { return address ^ ((address >> 7 & ((1u << bits) - 1)) << 4); }

// ------------------------------------------------------------------------------------------------------------------------------- barriers
struct Barrier {
    int arrivals, left;
    int64_t bytes;
    uint32_t phase;
    bool is_fenced;

    void look() {
        if (left == 0 && bytes == 0)
            left = arrivals, ++phase;
    }
};

std::map<const void*, Barrier> barriers;

Barrier& barrier_at(const void* place) {
    const auto found = barriers.find(place);
    if (found == barriers.end())
        fail("a barrier is used that has not been initialised");
    if (!found->second.is_fenced)
        fail("a barrier is used before the fence behind its initialisation");
    return found->second;
}

// ------------------------------------------------------------------------------------------------------------------------------- products
using Operand = std::vector<unsigned char>; // rows of 16 values

struct Product {
    std::array<GroupProduct, kGroupThreads> threads;
    std::array<std::array<uint32_t, 4>, kGroupThreads> a;
    Operand b;
    std::vector<float> d; // [64, columns], as it will be

    int columns() const { return threads[0].count * 2; }
    float& sum(int thread, int i) { return d[size_t(row_of(thread, i / 2 % 2) * columns() + i / 4 * 8 + thread % 4 * 2 + i % 2)]; }
    static int row_of(int thread, int half) { return thread / 32 * 16 + thread % 32 / 4 + half * 8; }
};

struct Group {
    std::vector<Product> under_way;
    std::map<const void*, std::vector<uint32_t>> at_fence; // what registers held
    std::vector<int> sizes;                                // of the committed groups under way, in products
    bool is_fenced = false;                                // since the last group was committed
};

std::map<int, Group> groups; // by their first thread
int64_t products = 0;        // of warp groups, that have been started at all

int first_thread() { return int(here().thread.x) / kGroupThreads * kGroupThreads; }
Group& own_group() { return groups[first_thread()]; }

std::vector<uint32_t> words_of(const void* p, size_t count) {
    std::vector<uint32_t> words(count);
    memcpy(words.data(), p, count * sizeof(uint32_t));
    return words;
}

// The right operand that a descriptor tells of, as the instruction reads it: columns of the product one after the other.
Operand read_operand(uint64_t descriptor, int columns) {
    static constexpr int bits_of_mode[] = {0, 3, 2, 1};
    const uint32_t start = uint32_t(descriptor & 0x3fff) << 4;
    const uint32_t leading = uint32_t(descriptor >> 16 & 0x3fff) << 4, stride = uint32_t(descriptor >> 32 & 0x3fff) << 4;
    const uint32_t offset = uint32_t(descriptor >> 49 & 7);
    const int bits = bits_of_mode[descriptor >> 62];
    constexpr uint64_t fields = 0x3fffull | 0x3fffull << 16 | 0x3fffull << 32 | 7ull << 49 | 3ull << 62;
    if (descriptor & ~fields)
        fail("the descriptor %#llx of an operand has bits where there must be none", static_cast<unsigned long long>(descriptor));
    const uint32_t width = 16u << bits;
    Operand operand(size_t(columns) * 32);
    for (uint32_t column = 0; column < uint32_t(columns); ++column)
        for (uint32_t vector = 0; vector < 2; ++vector) {
            const uint32_t within = bits == 0 ? vector * leading : vector * 16; // swizzled rows hold all 16 values
            const uint32_t address = start + column % 8 * width + column / 8 * stride + within;
            const uint32_t pattern = (address >> 7) - offset;
            const uint32_t place = bits == 0 ? address : address ^ (pattern & ((1u << bits) - 1)) << 4;
            memcpy(operand.data() + column * 32 + vector * 16, shared_place(place, 16), 16);
        }
    return operand;
}

// d += a . b^T, for every k of the 16 in double, rounded once.
void compute(Product& product) {
    const int columns = product.columns();
    std::array<std::array<float, 16>, 64> a;
    std::array<std::array<float, kMostColumns>, 16> b;
    const auto widen = product.threads[0].widen;
    for (int thread = 0; thread < kGroupThreads; ++thread)
        for (int i = 0; i < 4; ++i)
            for (int half = 0; half < 2; ++half)
                a[size_t(Product::row_of(thread, i % 2))][size_t(thread % 4 * 2 + i / 2 * 8 + half)] =
                    widen(uint16_t(product.a[size_t(thread)][size_t(i)] >> 16 * half));
    for (size_t column = 0; column < size_t(columns); ++column)
        for (size_t k = 0; k < 16; ++k) {
            uint16_t bits;
            memcpy(&bits, product.b.data() + column * 32 + k * 2, 2);
            b[k][column] = widen(bits);
        }
    for (size_t row = 0; row < 64; ++row) {
        std::array<double, kMostColumns> sums;
        float* d = product.d.data() + row * size_t(columns);
        for (size_t column = 0; column < size_t(columns); ++column)
            sums[column] = d[column];
        for (size_t k = 0; k < 16; ++k)
            for (size_t column = 0; column < size_t(columns); ++column)
                sums[column] += double(a[row][k]) * b[k][column];
        for (size_t column = 0; column < size_t(columns); ++column)
            d[column] = float(sums[column]);
    }
}

// The last product under way that writes to these sums.
Product* writer_of(Group& group, const float* d) {
    for (auto product = group.under_way.rbegin(); product != group.under_way.rend(); ++product)
        if (product->threads[0].d == d)
            return &*product;
    return nullptr;
}

void check_fenced(Group& group, const void* registers, size_t count) {
    const auto found = group.at_fence.find(registers);
    const bool is_known = found != group.at_fence.end();
    if (is_known ? found->second != words_of(registers, count) : !group.is_fenced)
        fail("a product of a warp group takes registers that were written behind the last fence");
    if (!is_known)
        group.at_fence[registers] = words_of(registers, count);
}

void check_untouched(const GroupProduct& thread) {
    for (int i = 0; i < thread.count; ++i)
        if (float_bits(thread.d[i]) != kUntouched)
            fail("sums of a warp group were touched while a product was under way");
}

void start_product(const Part* parts, int count) {
    Group& group = own_group();
    Product product;
    for (int i = 0; i < count; ++i) {
        const auto& thread = product.threads[size_t(i)] = *static_cast<const GroupProduct*>(parts[i].in);
        if (thread.b != product.threads[0].b || thread.count != product.threads[0].count)
            fail("the threads of a warp group bring different operands");
        check_fenced(group, thread.a, 4);
        memcpy(product.a[size_t(i)].data(), thread.a, sizeof product.a[0]);
    }
    product.b = read_operand(product.threads[0].b, product.columns());
    Product* writer = writer_of(group, product.threads[0].d);
    product.d.resize(size_t(64 * product.columns()));
    for (int i = 0; i < count; ++i) {
        const auto& thread = product.threads[size_t(i)];
        if (writer == nullptr)
            check_fenced(group, thread.d, size_t(thread.count));
        else
            check_untouched(thread);
        for (int j = 0; j < thread.count; ++j) {
            product.sum(i, j) = writer != nullptr ? writer->sum(i, j) : thread.d[j];
            thread.d[j] = float_from_bits(kUntouched);
        }
    }
    compute(product);
    ++products;
    group.under_way.push_back(std::move(product));
}

void end_product(Group& group) {
    Product product = std::move(group.under_way.front());
    group.under_way.erase(group.under_way.begin());
    if (read_operand(product.threads[0].b, product.columns()) != product.b)
        fail("the operand of a product in shared memory was touched while the product was under way");
    const bool is_last = writer_of(group, product.threads[0].d) == nullptr;
    for (int i = 0; i < kGroupThreads; ++i) {
        const auto& thread = product.threads[size_t(i)];
        if (memcmp(thread.a, product.a[size_t(i)].data(), sizeof product.a[0]) != 0)
            fail("the operand of a product in registers was touched while the product was under way");
        check_untouched(thread);
        for (int j = 0; is_last && j < thread.count; ++j)
            thread.d[j] = product.sum(i, j);
        if (is_last)
            group.at_fence[thread.d] = words_of(thread.d, size_t(thread.count));
    }
}

void pass_fence(const Part*, int) {
    Group& group = own_group();
    group.is_fenced = true;
    for (auto& [registers, words] : group.at_fence)
        words = words_of(registers, words.size());
}

void commit(const Part*, int) {
    Group& group = own_group();
    int size = int(group.under_way.size());
    for (const int earlier : group.sizes)
        size -= earlier;
    group.sizes.push_back(size);
    group.is_fenced = false;
}

void end_groups(const Part* parts, int) {
    Group& group = own_group();
    const size_t left = size_t(*static_cast<const int*>(parts[0].in));
    for (; group.sizes.size() > left; group.sizes.erase(group.sizes.begin()))
        for (int i = 0; i < group.sizes.front(); ++i)
            end_product(group);
}

void start_block() {
    barriers.clear();
    groups.clear();
}

void end_block() {
    for (const auto& [first, group] : groups)
        if (!group.under_way.empty())
            fail("a block has ended while products of a warp group were under way");
}

const bool is_watching = (watch_blocks(start_block, end_block), true);

void need_hopper() {
    if (architecture() != 90)
        fail("only capability 9.0 has what sm_90a has");
}

void of_group(GroupFunction function, const void* in) {
    need_hopper();
    group_operation(first_thread(), kGroupThreads, function, in, nullptr);
}

} // namespace

uint32_t shared_address(const void* p) {
    const auto* place = static_cast<const unsigned char*>(p);
    return kFirstAddress + uint32_t(place - static_cast<const unsigned char*>(dynamic_shared_storage()));
}

void barrier_init(uint64_t* barrier, int arrivals) {
    need_hopper();
    give_way();
    barriers[barrier] = {arrivals, arrivals, 0, 0, false};
}

void fence_barrier_init() {
    for (auto& entry : barriers)
        entry.second.is_fenced = true;
}

void barrier_arrive(uint64_t* barrier, int bytes) {
    Barrier& own = barrier_at(barrier);
    if (own.left == 0)
        fail("more than %d arrivals in a phase of a barrier", own.arrivals);
    own.bytes += bytes;
    --own.left;
    own.look();
    give_way();
}

void barrier_wait(const uint64_t* barrier, uint32_t parity) {
    struct Wanted {
        const Barrier* barrier;
        uint32_t parity;
    } wanted{&barrier_at(barrier), parity};
    const auto has_ended = [](const void* object) {
        const auto& wanted = *static_cast<const Wanted*>(object);
        return (wanted.barrier->phase & 1) != wanted.parity;
    };
    if (parity > 1)
        fail("a parity is 0 or 1, not %u", parity);
    wait_until(has_ended, &wanted, "a phase of a barrier");
}

void copy_tile(void* shared, const TensorMap& map, int x, int y, uint64_t* barrier) {
    const uint32_t start = shared_address(shared);
    const size_t bytes = size_t(map.box_rows) * size_t(map.box_bytes);
    if (start % 128 != 0)
        fail("a tile is copied to address %u, which is not aligned to 128 bytes", start);
    memset(shared_place(start, bytes), 0xff, bytes);
    Barrier& own = barrier_at(barrier);
    do_later([=, &own] {
        const int64_t left = int64_t(x) * map.bytes_of_element;
        for (int row = 0; row < map.box_rows; ++row)
            for (int byte = 0; byte < map.box_bytes; ++byte) {
                const bool exists = y + row >= 0 && y + row < map.rows && left + byte >= 0 && left + byte < map.bytes_of_row;
                const uint32_t address = swizzled(start + uint32_t(row * map.box_bytes + byte), int(map.swizzle));
                *shared_place(address, 1) = exists ? map.matrix[(y + row) * map.bytes_of_row + left + byte] : 0;
            }
        own.bytes -= int64_t(bytes);
        own.look();
    });
}

void group_fence() { of_group(pass_fence, nullptr); }
void group_commit() { of_group(commit, nullptr); }
void group_wait(int groups_left) { of_group(end_groups, &groups_left); }
void group_multiply(const GroupProduct& product) { of_group(start_product, &product); }

} // namespace emulation
} // namespace bnb

// For tests: whether a kernel has used what only sm_90a has.
BNB_API int64_t bnb_emulation_group_products() { return bnb::emulation::products; }
