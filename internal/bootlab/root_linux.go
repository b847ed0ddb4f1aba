package bootlab

import (
	"context"
	"crypto/sha256"
	"encoding/hex"
	"fmt"
	"os"
	osexec "os/exec"
	"path/filepath"
	"strings"
	"syscall"
)

// Image is a Debian to boot.
type Image struct {
	Suite    string
	Packages []string
	// Later are packages that cannot be configured by debootstrap(8), such as firewalld,
	// whose polkitd wants what is configured after it. They are installed by apt-get, and
	// their services are disabled.
	Later []string
}

// Copy puts a root of its own at folder, which does not exist, and returns what takes
// that away again. The image is made once, in about a minute and a half with firewalld,
// and kept in the user's cache (os.UserCacheDir), or in the folder that TPROXY_CACHE
// names, until somebody deletes it. outside is that of Make.
func (i Image) Copy(ctx context.Context, folder, outside string) (remove func(), err error) {
	lower, err := i.cached(ctx, outside)
	if err != nil {
		return nil, err
	}
	upper, work := folder+".upper", folder+".work"
	for _, f := range []string{folder, upper, work} {
		if err := os.MkdirAll(f, 0o755); err != nil {
			return nil, err
		}
	}
	unmounted := func() {
		_ = syscall.Unmount(folder, 0)
		for _, f := range []string{folder, upper, work} {
			_ = os.RemoveAll(f)
		}
	}
	err = syscall.Mount("overlay", folder, "overlay", 0, "lowerdir="+lower+",upperdir="+upper+",workdir="+work)
	if err != nil { // an overlay may not be on another one
		out, e := osexec.CommandContext(ctx, "cp", "--archive", "--reflink=auto", lower+"/.", folder).CombinedOutput()
		if e != nil {
			return nil, fmt.Errorf("copy of %s: %w\n%s", lower, e, last(out))
		}
	}
	return unmounted, nil
}

// cached returns the image's own root, which nobody may change.
func (i Image) cached(ctx context.Context, outside string) (string, error) {
	cache := os.Getenv("TPROXY_CACHE")
	if cache == "" {
		user, err := os.UserCacheDir()
		if err != nil {
			return "", err
		}
		cache = filepath.Join(user, "kuma-tproxy")
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	key := sha256.Sum256(fmt.Appendf(nil, "1 %s %q %q", i.Suite, i.Packages, i.Later))
	root := filepath.Join(cache, i.Suite+"-"+hex.EncodeToString(key[:6]))
	lock, err := os.OpenFile(root+".lock", os.O_CREATE|os.O_RDWR, 0o644)
	if err != nil {
		return "", err
	}
	defer lock.Close()
	if err := syscall.Flock(int(lock.Fd()), syscall.LOCK_EX); err != nil {
		return "", err
	}
	if _, err := os.Stat(root); err == nil {
		return root, nil
	}
	part := root + ".part" // of one that was killed
	if err := os.RemoveAll(part); err != nil {
		return "", err
	}
	if err := Make(ctx, part, i.Suite, i.Packages, outside); err != nil {
		return "", err
	}
	if len(i.Later) > 0 {
		if err := installLater(ctx, part, i.Later, outside); err != nil {
			return "", err
		}
	}
	return root, os.Rename(part, root)
}

// later installs packages; no service starts by that (invoke-rc.d(8)), or at a boot.
const later = `set -e
printf '#!/bin/sh\nexit 101\n' >/usr/sbin/policy-rc.d
chmod 755 /usr/sbin/policy-rc.d
export DEBIAN_FRONTEND=noninteractive
apt-get install -y -qq --no-install-recommends "$@"
rm /usr/sbin/policy-rc.d
for p; do
	units=$(dpkg -L "$p" | sed -n 's|.*/systemd/system/\([^/]*\.service\)$|\1|p')
	[ -z "$units" ] || systemctl disable $units
done
apt-get clean
`

func installLater(ctx context.Context, folder string, packages []string, outside string) error {
	args := []string{"systemd-nspawn", "--quiet", "--directory=" + folder, "--register=no", "--keep-unit", "--pipe"}
	if text, err := os.ReadFile("/etc/resolv.conf"); err == nil {
		// Where the root has a link of systemd-resolved's, a file of the machine's at its end.
		file := filepath.Join(filepath.Dir(folder), filepath.Base(folder)+".resolv.conf")
		if err := os.WriteFile(file, text, 0o644); err != nil {
			return err
		}
		defer os.Remove(file)
		to := "/etc/resolv.conf"
		if at, err := os.Readlink(folder + to); err == nil {
			to = filepath.Join("/etc", at)
		}
		args = append(args, "--resolv-conf=off", "--bind-ro="+file+":"+to)
	}
	args = append(append(args, "sh", "-c", later, "sh"), packages...)
	if outside != "" {
		args = append([]string{"nsenter", "--net=" + outside}, args...)
	}
	out, err := osexec.CommandContext(ctx, args[0], args[1:]...).CombinedOutput()
	if err != nil {
		return fmt.Errorf("apt-get install %s: %w\n%s", strings.Join(packages, " "), err, last(out))
	}
	return nil
}
