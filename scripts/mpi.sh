# Gets an MPI for the crate gradclip-mpi and its tests (Debian). Other scripts source this after devices.sh.
# shellcheck shell=bash

# Installs OpenMPI, unless there is an MPI, and libclang, with which the crate mpi-sys reads its headers.
install_mpi() {
    has_mpi || need_mpi "${MPICC:-mpicc}" libopenmpi-dev openmpi-bin
    has_libclang || need_mpi libclang libclang-dev
}

# Installs MPICH beside it, for builds with MPICC=mpicc.mpich.
install_mpich() {
    command -v mpicc.mpich >/dev/null && command -v mpiexec.mpich >/dev/null || need_mpi mpicc.mpich libmpich-dev mpich
    has_libclang || need_mpi libclang libclang-dev
}

has_mpi() {
    command -v "${MPICC:-mpicc}" >/dev/null && { command -v mpirun || command -v mpiexec; } >/dev/null
}

# libclang-cpp, which comes with OpenCL drivers, does not count.
has_libclang() {
    [ -z "${LIBCLANG_PATH:-}" ] || return 0
    local folder
    for folder in '/usr/lib*' '/usr/lib*/*' '/usr/lib/llvm*/lib'; do
        if compgen -G "$folder/libclang[.-][s0-9]*" >/dev/null; then return 0; fi
    done
    return 1
}

# need_mpi WHAT PACKAGE...: installs the packages.
need_mpi() {
    local what=$1
    shift
    if ! command -v apt-get >/dev/null; then
        echo "error: gradclip-mpi needs $what; install OpenMPI or MPICH, with its compiler and mpirun, and libclang" >&2
        exit 1
    fi
    install "$@"
}
