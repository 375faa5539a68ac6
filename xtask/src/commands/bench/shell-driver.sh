#!/bin/sh
# A FlexVolume driver as such drivers are commonly written: a shell script that
# calls the usual tools. It is there to be compared with, not to be used.

answer() {
    printf '{"status":"%s","message":"%s"}\n' "$1" "$2"
    [ "$1" = Success ]
    exit
}

# The value of a key in a flat JSON object without escapes.
option() {
    printf '%s' "$json" | sed -n "s|.*\"$1\":\"\([^\"]*\)\".*|\1|p"
}

mount_data() {
    vg=$(option volumeGroup)
    lv=$(option logicalVolume)
    fs=$(option kubernetes.io/fsType)
    lvs --noheadings -o lv_name "$vg/$lv" > /dev/null 2>&1 || answer Failure "no volume $vg/$lv"
    device=/dev/$vg/$lv
    if [ -z "$(blkid -o value -s TYPE "$device")" ]; then
        mkfs -t "$fs" "$device" > /dev/null 2>&1 || answer Failure "mkfs failed"
    fi
    mkdir -p "$directory"
    mount -t "$fs" "$device" "$directory" > /dev/null 2>&1 || answer Failure "mount failed"
}

mount_log() {
    pod=$(option kubernetes.io/pod.name)
    base=/var/log/lvprov/$(option kubernetes.io/pod.namespace)/$(option volume)
    mountpoint -q "$base" || answer Failure "$base is not mounted"
    mkdir -p "$base/$pod" "$directory"
    project=$(printf '%s' "$pod" | cksum | cut -c1-6)
    quota=$(option quota)
    xfs_quota -x -c "project -s -p $base/$pod $project" -c "limit -p bhard=${quota%i} $project" "$base" \
        > /dev/null 2>&1 || answer Failure "no quota"
    mount --bind "$base/$pod" "$directory" > /dev/null 2>&1 || answer Failure "mount failed"
}

verb=$1 directory=$2 json=$3
case $verb in
init)
    echo '{"status":"Success","capabilities":{"attach":false}}'
    ;;
mount)
    mountpoint -q "$directory" && answer Success
    case $(option type) in
    data) mount_data ;;
    log) mount_log ;;
    *) answer Failure "unknown type" ;;
    esac
    answer Success
    ;;
unmount)
    mountpoint -q "$directory" || answer Success
    umount "$directory" > /dev/null 2>&1 || answer Failure "umount failed"
    answer Success
    ;;
*)
    answer "Not supported"
    ;;
esac
