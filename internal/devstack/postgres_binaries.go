package devstack

import (
	"cmp"
	"context"
	"errors"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strconv"
	"strings"

	embeddedpostgres "github.com/fergusstrange/embedded-postgres"
)

// downloadVersion is the PostgreSQL that is downloaded where none is installed.
const downloadVersion = embeddedpostgres.V17

// binaries says where to look for PostgreSQL. The zero value looks at the usual places.
type binaries struct {
	folders    func() []string // default: installedFolders
	repository string          // where to download from; default: the library's
	cache      string          // where downloads are kept; default: cacheFolder
}

// find returns the folder with initdb and postgres that account may run, downloading them as the last resort.
func (b binaries) find(ctx context.Context, account *account, log *slog.Logger) (string, error) {
	folders := installedFolders
	if b.folders != nil {
		folders = b.folders
	}
	for _, dir := range folders() {
		if hasPostgres(dir) && account.reaches(filepath.Join(dir, "postgres")) {
			return dir, nil
		}
	}
	dir, err := b.download(ctx, account, log)
	if err != nil {
		return "", fmt.Errorf("none is installed (looked in PATH, /usr/lib/postgresql, Homebrew and Postgres.app), and the download failed: %w", err)
	}
	return dir, nil
}

// installedFolders lists where PostgreSQL's programs may be, best first: what the user put into PATH, then the newest.
func installedFolders() []string {
	var found []string
	for _, name := range []string{"postgres", "initdb"} {
		if file, err := exec.LookPath(name); err == nil {
			found = append(found, filepath.Dir(file))
		}
	}
	for _, pattern := range []string{
		"/usr/lib/postgresql/*/bin", // Debian, Ubuntu, Alpine
		"/usr/pgsql-*/bin",          // Red Hat, from PostgreSQL's repository
		"/opt/homebrew/opt/postgresql@*/bin",
		"/usr/local/opt/postgresql@*/bin",
		"/home/linuxbrew/.linuxbrew/opt/postgresql@*/bin",
		"/Applications/Postgres.app/Contents/Versions/*/bin",
	} {
		matches, _ := filepath.Glob(pattern) // the patterns are well formed
		slices.SortStableFunc(matches, func(a, b string) int { return cmp.Compare(majorVersion(b), majorVersion(a)) })
		found = append(found, matches...)
	}
	return found
}

// majorVersion is the number in the name of a version's folder: 17 in /usr/pgsql-17/bin. Names without one sort last.
func majorVersion(bin string) int {
	name := filepath.Base(filepath.Dir(bin))
	digits := name[strings.LastIndexAny(name, "-@")+1:]
	digits, _, _ = strings.Cut(digits, ".")
	n, err := strconv.Atoi(digits)
	if err != nil {
		return 0
	}
	return n
}

func hasPostgres(dir string) bool {
	for _, name := range []string{"initdb", "postgres"} {
		info, err := os.Stat(filepath.Join(dir, name))
		if err != nil || info.IsDir() || info.Mode().Perm()&0o111 == 0 {
			return false
		}
	}
	return true
}

// cacheFolder is where downloads stay for the next run. A root user's own cache is closed to the account that runs
// PostgreSQL.
func cacheFolder(account *account) (string, error) {
	if account != nil {
		return "/var/cache/postrider", nil
	}
	dir, err := os.UserCacheDir()
	return filepath.Join(dir, "postrider"), err
}

// download returns the folder with PostgreSQL's programs from the cache, after fetching them if they are not there.
//
// The library can fetch only on the way to a server of its own, which would not survive as root and would outlive a
// killed process. So it gets a data directory that looks initialised, fetches and unpacks, and fails to start on it.
func (b binaries) download(ctx context.Context, account *account, log *slog.Logger) (string, error) {
	cache := b.cache
	if cache == "" {
		var err error
		if cache, err = cacheFolder(account); err != nil {
			return "", err
		}
	}
	target := filepath.Join(cache, "postgres-"+string(downloadVersion))
	bin := filepath.Join(target, "bin")
	if hasPostgres(bin) {
		return bin, nil
	}
	if err := os.MkdirAll(cache, 0o755); err != nil {
		return "", err
	}
	if !account.reaches(target) {
		return "", fmt.Errorf("the user who runs PostgreSQL cannot enter %s", cache)
	}
	work, err := os.MkdirTemp(cache, "download-") // beside the target, to be renamed: nobody sees half of it
	if err != nil {
		return "", err
	}
	defer os.RemoveAll(work)
	data := filepath.Join(work, "data")
	major, _, _ := strings.Cut(string(downloadVersion), ".")
	if err := os.Mkdir(data, 0o700); err != nil {
		return "", err
	}
	if err := os.WriteFile(filepath.Join(data, "PG_VERSION"), []byte(major), 0o600); err != nil {
		return "", err
	}
	port, err := freePort()
	if err != nil {
		return "", err
	}
	unpacked := filepath.Join(work, "postgres")
	cfg := embeddedpostgres.DefaultConfig().Version(downloadVersion).Port(uint32(port)).Logger(io.Discard).
		CachePath(filepath.Join(work, "archive")).RuntimePath(filepath.Join(work, "run")).DataPath(data).BinariesPath(unpacked)
	if b.repository != "" {
		cfg = cfg.BinaryRepositoryURL(b.repository)
	}

	log.Info("devstack: no PostgreSQL on this machine, downloading it once", "version", downloadVersion, "to", target)
	done := make(chan error, 1) // the library knows no context: when ours ends, its request runs to its own end
	go func() { done <- embeddedpostgres.NewDatabase(cfg).Start() }()
	select {
	case err = <-done:
	case <-ctx.Done():
		return "", ctx.Err()
	}
	if !hasPostgres(filepath.Join(unpacked, "bin")) {
		return "", cmp.Or(err, errors.New("the archive holds no initdb and postgres"))
	}
	if err := os.Chmod(unpacked, 0o755); err != nil {
		return "", err
	}
	if err := os.Rename(unpacked, target); err != nil && !hasPostgres(bin) { // another process may have been first
		return "", err
	}
	return bin, nil
}
