# shellcheck shell=bash
# Variables of a cluster's network. Copy this file to network.sh in the same folder and take out the comment signs of
# what your cluster needs: the batch scripts source network.sh on the job's first node, and srun hands the variables to
# all ranks. Begin with nothing set: NCCL finds its network by itself on most clusters. Then run preflight.sbatch.
#
# VERIFIED here means that we have run it: that is GLOO_SOCKET_IFNAME=lo alone, on one machine. Everything else is
# UNVERIFIED by us and comes from the documentation of NCCL, libfabric and PyTorch; your cluster's own documentation is
# right where it says something else.

# --- Which interfaces

# The interface for NCCL's first contact, and for all its data where there is no InfiniBand or EFA. A list of beginnings
# of names; `=` before it asks for whole names, `^` excludes. Set it when ranks do not find each other ("connection
# refused", a hang in the first collective), or when a docker or virtual interface is taken. UNVERIFIED.
#export NCCL_SOCKET_IFNAME=eth
#export NCCL_SOCKET_IFNAME=^lo,docker,virbr

# The same for gloo: runs without GPUs, and the checkpoints that torchtitan saves in the background
# (checkpoint.async_mode). Whole names. Without it gloo takes the address that the node's own name resolves to, so set
# it when that is 127.0.0.1 or 127.0.1.1. VERIFIED with `lo`; other interfaces UNVERIFIED.
#export GLOO_SOCKET_IFNAME=eth0

# --- InfiniBand and RoCE

# The adapters to use, with `=` and `^` as above. Set it when some adapters belong to storage or to another network:
# `ibv_devinfo` lists them. UNVERIFIED.
#export NCCL_IB_HCA==mlx5_0,mlx5_1,mlx5_2,mlx5_3
#export NCCL_IB_HCA=^mlx5_bond_0

# No InfiniBand or RoCE at all: everything goes over IP sockets, much slower. Set it to find out whether the adapters
# are at fault, or where there are adapters that do not reach the other nodes. UNVERIFIED.
#export NCCL_IB_DISABLE=1

# RoCE alone: the index of the address to use, where NCCL picks a wrong one (`show_gids` lists them; often 3 is
# RoCE v2), and the traffic class that the switches keep free of losses. UNVERIFIED.
#export NCCL_IB_GID_INDEX=3
#export NCCL_IB_TC=106

# How long an adapter waits before it sends again (4.096 us * 2^value, 5 to 7 times). Raise it for errors such as
# "ibv_poll_cq ... status=12" in long runs on large networks. UNVERIFIED.
#export NCCL_IB_TIMEOUT=22

# How far from a GPU an adapter may be to read its memory without the CPU: LOC, PIX, PXB, PHB, SYS. Set it when the
# bandwidth between nodes is far below that of the adapters and NCCL_DEBUG=INFO does not say GDRDMA. UNVERIFIED.
#export NCCL_NET_GDR_LEVEL=PHB

# --- AWS with Elastic Fabric Adapter

# Through libfabric, by the plugin aws-ofi-nccl, which has to be installed and found (LD_LIBRARY_PATH; NCCL_DEBUG=INFO
# says "NET/OFI" when it is). UNVERIFIED.
#export FI_PROVIDER=efa

# Reads and writes of GPU memory by the adapter. Needed by older versions of libfabric on p4d; newer ones see by
# themselves whether they can. UNVERIFIED.
#export FI_EFA_USE_DEVICE_RDMA=1

# Lets a process that uses the adapter fork, as data loaders do; needed by older versions of libfabric and of Linux.
# UNVERIFIED.
#export FI_EFA_FORK_SAFE=1

# End the run rather than fall back to IP sockets when the plugin is not found. UNVERIFIED.
#export NCCL_NET="AWS Libfabric"

# --- To find out what happens

# What NCCL says: WARN for errors, INFO for the interfaces, adapters and paths it has chosen, of every rank, so set it
# for one run, and choose its parts. %h is the node's name and %p the process. UNVERIFIED.
#export NCCL_DEBUG=INFO
#export NCCL_DEBUG_SUBSYS=INIT,NET
#export NCCL_DEBUG_FILE="$SLURM_SUBMIT_DIR/nccl-$SLURM_JOB_ID-%h-%p.log"

# --- PyTorch, when collectives hang

# PyTorch aborts a process whose NCCL watchdog gives no sign of life for so many seconds. Raise it where a run is ended
# while it compiles, loads or saves for longer. UNVERIFIED.
#export TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC=1800

# torchtitan sets TORCH_NCCL_ASYNC_ERROR_HANDLING, TORCH_FR_BUFFER_SIZE, TORCH_FR_DUMP_TEMP_FILE and
# TORCH_NCCL_DUMP_ON_TIMEOUT itself: use its settings comm.trace_buf_size (0 turns the record of collectives off) and
# comm.save_traces_folder, and comm.init_timeout_seconds and comm.train_timeout_seconds for how long a collective may
# take.
