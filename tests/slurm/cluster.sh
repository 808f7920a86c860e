#!/usr/bin/env bash
# A SLURM of one node on 127.0.0.1, for tests: munged, slurmctld and slurmd, with all their state in one folder.
#
#     tests/slurm/cluster.sh start FOLDER [MEGABYTES]     then: export SLURM_CONF=FOLDER/slurm.conf
#     tests/slurm/cluster.sh stop FOLDER
#
# Needs Debian's slurm-wlm and munge, no systemd, no database, no root, and nothing in /etc. FOLDER is best a short path:
# it holds sockets. There is no accounting (so no sacct), what has ended is forgotten by squeue after a while, and jobs
# that ended are a line each in FOLDER/completed. The partition "test" has four CPUs, be there as many or not, and jobs
# of a minute unless they ask for another time; "short" allows no job of more than a minute.
set -euo pipefail

usage() { sed -n '2,/^set/{/^set/d;s/^# \?//;p}' "$0" >&2; exit 2; }
[ $# -ge 2 ] || usage
mkdir -p "$2"
folder=$(cd "$2" && pwd -P)

gone() { # whether the process that wrote a pid file is there no more, or becomes so within ten seconds
  for _ in $(seq 100); do kill -0 "$1" 2>/dev/null || return 0; sleep 0.1; done
  return 1
}

stop() {
  for daemon in slurmd slurmctld munged; do
    [ -s "$folder/$daemon.pid" ] || continue
    pid=$(cat "$folder/$daemon.pid")
    # pids are used again: what is stopped must be that daemon
    [ "$(cat "/proc/$pid/comm" 2>/dev/null)" = "$daemon" ] || continue
    kill "$pid" 2>/dev/null || true
    gone "$pid" || kill -9 "$pid" 2>/dev/null || true
  done
}

start() {
  for program in munged slurmctld slurmd scontrol; do
    command -v "$program" >/dev/null || { echo "no $program here: apt-get install slurm-wlm munge" >&2; exit 3; }
  done
  local me host ports megabytes
  me=$(id -un) host=$(hostname -s) megabytes=${1:-4096}
  ports=($(python3 -c 'import socket
held = [socket.create_server(("127.0.0.1", 0)) for _ in range(2)]
print(*(each.getsockname()[1] for each in held))'))
  mkdir -p "$folder/state" "$folder/spool"
  chmod 755 "$folder"
  (umask 077; head -c 128 /dev/urandom >"$folder/munge.key")
  cat >"$folder/slurm.conf" <<CONF
ClusterName=test
SlurmctldHost=$host(127.0.0.1)
SlurmctldPort=${ports[0]}
SlurmdPort=${ports[1]}
SlurmUser=$me
SlurmdUser=$me
AuthType=auth/munge
AuthInfo=socket=$folder/munge.socket,cred_expire=5
CredType=cred/munge
StateSaveLocation=$folder/state
SlurmdSpoolDir=$folder/spool
SlurmctldPidFile=$folder/slurmctld.pid
SlurmdPidFile=$folder/slurmd.pid
SlurmctldLogFile=$folder/slurmctld.log
SlurmdLogFile=$folder/slurmd.log
MailProg=/bin/true
MpiDefault=none
# no control groups: containers seldom let us make any
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
JobAcctGatherType=jobacct_gather/linux
JobAcctGatherFrequency=task=1
JobAcctGatherParams=OverMemoryKill
SelectType=select/cons_tres
SelectTypeParameters=CR_CPU_Memory
AccountingStorageType=accounting_storage/none
JobCompType=jobcomp/filetxt
JobCompLoc=$folder/completed
# tests wait for nothing that they need not
SchedulerParameters=sched_interval=1,batch_sched_delay=0,sched_min_interval=0,requeue_delay=0
SchedulerType=sched/builtin
KillWait=10
MinJobAge=300
EnforcePartLimits=ALL
ReturnToService=2
SlurmctldTimeout=60
SlurmdTimeout=60
MaxArraySize=8
# CPUs are told and not counted
SlurmdParameters=config_overrides
NodeName=$host NodeAddr=127.0.0.1 CPUs=4 RealMemory=$megabytes State=UNKNOWN
PartitionName=test Nodes=$host Default=YES DefaultTime=1 MaxTime=60 DefMemPerCPU=256 State=UP
PartitionName=short Nodes=$host MaxTime=1 DefMemPerCPU=256 State=UP
CONF
  export SLURM_CONF="$folder/slurm.conf"
  munged --force --key-file="$folder/munge.key" --socket="$folder/munge.socket" --pid-file="$folder/munged.pid" \
    --log-file="$folder/munged.log" --seed-file="$folder/munge.seed"
  slurmctld -c
  slurmd -c
  for _ in $(seq 100); do
    [ "$(sinfo --noheader --partition=test --format=%t 2>/dev/null)" = idle ] && { echo "$SLURM_CONF"; return; }
    sleep 0.2
  done
  echo "the node does not become idle:" >&2
  tail -n 15 "$folder"/*.log >&2
  stop
  exit 1
}

case $1 in
  start) start "${3:-}" ;;
  stop) stop ;;
  *) usage ;;
esac
